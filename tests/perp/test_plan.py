import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from perp import footprint, machine, pace, workload
from perp.blocks import find_blocks
from perp.pace import Rates
from perp.plan import Budget, advice, choose, predict
from perp.workload import Shape, UnitShape, Work, shape_of

from . import families

RATES = Rates(1e12, 5e11, 4e11, 2e12, 3e12, 1e9, 1e9, 2e9, disk=1e9, lesson=8e11, teach=6e11, build=0.1)
AMPLE = Budget(device=1 << 50, host=1 << 50, disk=1 << 50)
# LLaMA-2-70B: 80 blocks of 8192, inner 28672, 8 groups of keys, vocabulary 32000.
LARGE = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def shape(config) -> Shape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def test_shapes_are_those_of_the_configuration():
    found = shape(LARGE)
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024
    mlp = 3 * 8192 * 28672
    assert [unit.weights for unit in found.units] == [attention, mlp]
    assert found.inside == 80 * (attention + mlp + 2 * 8192)
    assert found.outside == 2 * 32000 * 8192 + 8192
    assert (found.blocks, found.hidden, found.vocabulary, found.itemsize) == (80, 8192, 32000, 2)
    assert 68e9 < found.inside + found.outside < 70e9


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_has_its_linears_in_attention_and_the_rest(family):
    model = families.build(family)
    found = shape_of(model)
    assert len(found.units) == 2
    linears = [m for m in find_blocks(model)[1][0].modules() if isinstance(m, torch.nn.Linear)]
    assert sum(unit.weights for unit in found.units) == sum(linear.weight.numel() for linear in linears)
    assert found.block == sum(p.numel() for p in find_blocks(model)[1][0].parameters())


def test_streaming_takes_no_more_for_more_blocks():
    work = Work(128, 2048, judged=32, states=2)
    small, large = shape(LARGE), replace(shape(LARGE), blocks=800, inside=10 * shape(LARGE).inside)
    for gpu in (False, True):
        one, other = (predict(s, replace(work, gpu=gpu), RATES, True, "disk") for s in (small, large))
        assert (one.host, one.device) == (other.host, other.device)
        whole = predict(small, replace(work, gpu=gpu), RATES, False, "memory")
        assert max(whole.host, whole.device) > small.bytes
        assert other.seconds > 9 * one.seconds


def test_hidden_states_are_counted_where_they_are():
    work = Work(128, 2048, gpu=True)
    states = 2 * 128 * 2048 * 8192 * 2
    found = {place: predict(shape(LARGE), work, RATES, True, place) for place in ("device", "memory", "disk")}
    assert found["device"].device - found["disk"].device == states
    assert found["memory"].host - found["disk"].host == states
    assert found["disk"].disk - found["memory"].disk == states


def test_the_parts_of_a_fit_are_those_of_the_kept_weights():
    """bf16: values, the copy to go back to, fp32 copy, two moments and gradient, at half of the weights."""
    unit = UnitShape(((1000, 1000),))
    one = Shape(1, (unit,), unit.weights, 0, 1000, 10, 2)
    half, all_kept = (footprint._fit(unit, one, Work(1, 1, kept=kept, batch=1)) for kept in (0.5, 1.0))
    per_kept = 2 + 2 + 4 + 8 + 4 + 2 * 4
    assert all_kept - half == pytest.approx(per_kept * 5e5, rel=1e-3)


def test_seconds_are_products_over_rates():
    """One block of one linear, by hand: statistics, targets, losses before and after, and the training."""
    unit = UnitShape(((100, 50),))
    one = Shape(1, (unit,), unit.weights, 0, 50, 10, 4)
    work = Work(windows=6, seqlen=8, kept=0.5, epochs=3, batch=4, judged=5, states=1, steps=7, step_batch=2, rank=3)
    passed = 2 * 8 * (5000 + 2 * 8 * 50)
    told = pace.of_pruning(one, work, RATES, fitted=True)
    once = 6 * passed / 1e12
    steps = 3 * 2
    assert told == pytest.approx(
        3.5 * once + 5000 / 1e9 + 5000 / 1e9 + 3 * 6 * passed / 5e11 + steps * 2500 / 2e9, rel=1e-9
    )
    assert pace.of_pruning(one, work, RATES, fitted=False) == pytest.approx(2 * once + 5000 / 1e9, rel=1e-9)
    assert pace.of_judging(one, work, RATES) == pytest.approx(5 * passed / 1e12 + 2 * 5 * 8 * 500 / 2e12, rel=1e-9)
    trained = 14 * passed / 4e11 + 14 * 8 * 2 * 500 / 8e11 + 7 * 3 * 150 / 2e9
    assert pace.of_retraining(one, work, RATES) == pytest.approx(trained, rel=1e-9)


def test_each_cycle_is_a_pruning_of_its_own_share():
    found, work = shape(LARGE), Work(16, 2048, steps=9)
    cycled = replace(work, earlier=(0.8, 0.65))
    each = [pace.of_pruning(found, replace(work, kept=kept), RATES, True) for kept in (0.8, 0.65, 0.5)]
    once, thrice = (seconds(predict(found, one, RATES, False, "memory")) for one in (work, cycled))
    assert thrice["prune"] == pytest.approx(sum(each), rel=1e-12)
    assert thrice["prune"] > 3 * once["prune"]
    assert thrice["retrain"] == once["retrain"]
    # What the first cycle fits is the most: it keeps 0.8 of the weights.
    first = footprint.of_pruning(found, replace(work, kept=0.8))
    assert footprint.of_pruning(found, cycled) == first > footprint.of_pruning(found, work)
    # Streamed, a cycle's blocks are taken away when the next one has ended: three copies at most.
    for stream, cycles, stages in ((False, cycled, 2), (True, cycled, 3), (True, replace(work, earlier=(0.7,)), 2)):
        lengths = [predict(found, one, RATES, stream, "memory").stages[0].disk for one in (work, cycles)]
        assert lengths[1] - lengths[0] == stages * found.bytes


def test_the_teacher_s_states_are_counted_to_the_byte():
    found, work = shape(LARGE), Work(16, 2048, steps=9)
    taught = replace(work, taught=36)
    states = 36 * 2048 * 8192 * 2
    for gpu in (False, True):
        plain, mixed = (predict(found, replace(one, gpu=gpu), RATES, False, "memory") for one in (work, taught))
        assert host(mixed)["prune"] - host(plain)["prune"] == states
    plain, mixed = (predict(found, replace(one, gpu=True), RATES, True, "disk") for one in (work, taught))
    assert mixed.stages[1].disk - plain.stages[1].disk == states - 2 * 16 * 2048 * 8192 * 2
    # Streamed they are made when training begins, and wait in memory even where hidden states are on the device.
    plain, mixed = (predict(found, replace(one, gpu=True), RATES, True, "device") for one in (work, taught))
    assert host(mixed)["prune"] == host(plain)["prune"]
    assert host(mixed)["retrain"] - host(plain)["retrain"] == states
    twice = predict(found, replace(taught, taught=72, gpu=True), RATES, True, "device")
    assert [stage.device for stage in twice.stages] == [stage.device for stage in mixed.stages]
    assert host(twice)["dense states"] - host(mixed)["dense states"] == states
    plain, mixed = (predict(found, replace(one, gpu=True), RATES, True, "disk") for one in (work, taught))
    passed = 36 * 2 * 2048 * (found.inside + 80 * 2 * 2048 * 8192)
    assert seconds(mixed)["dense states"] == pytest.approx(passed / 6e11)
    assert seconds(mixed)["load and save"] - seconds(plain)["load and save"] == pytest.approx(
        80 * 0.1 + found.bytes / 1e9
    )
    # bf16 beside fp32 weights: the states are as narrow, and the model is there once more at half of its size.
    wide = replace(found, itemsize=4)
    assert footprint.of_teacher(wide, replace(taught, narrow=True), stream=False) == states
    assert footprint.of_teacher(wide, taught, stream=False) == 2 * states
    assert footprint.of_narrowing(wide, replace(work, narrow=True)) == wide.bytes // 2
    assert footprint.of_narrowing(found, replace(work, narrow=True)) == 0


def test_the_optimiser_s_moments_are_those_of_retraining():
    found, work = shape(LARGE), Work(16, 2048, steps=9, gpu=True)
    few = replace(work, moments=footprint.MOMENTS_8BIT)
    adapters = 16 * 80 * sum(outputs + inputs for unit in found.units for outputs, inputs in unit.linears)
    assert footprint.of_retraining(found, work) - footprint.of_retraining(found, few) == 6 * adapters
    assert footprint.of_pruning(found, work) == footprint.of_pruning(found, few)


def seconds(plan):
    return {stage.name: stage.seconds for stage in plan.stages}


def host(plan):
    return {stage.name: stage.host for stage in plan.stages}


def mixture(used: int) -> Shape:
    config = MixtralConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    config.num_experts_per_tok = used
    return shape(config)


def test_of_eight_experts_two_compute_and_all_are_there():
    two, every = mixture(2), mixture(8)
    one_expert = 3 * 64 * 96
    attention = 4 * 64 * 64
    assert [unit.weights for unit in two.units] == [attention, 8 * one_expert]
    assert [unit.active for unit in two.units] == [attention, 2 * one_expert]
    assert [unit.active for unit in every.units] == [attention, 8 * one_expert]
    # The router and two norms are no matrices to prune.
    assert two.block == attention + 8 * one_expert + 8 * 64 + 2 * 64
    work = Work(5, 16)
    head = 3 * 2 * 5 * 16 * (attention + 8 * 64 + 2 * 64 + 2 * 16 * 64)
    for found, share in ((two, 0.25), (every, 1.0)):
        flops = RATES.forward * pace.of_judging(found, replace(work, judged=5), replace(RATES, head=math.inf))
        assert flops == pytest.approx(head + share * 3 * 2 * 5 * 16 * 8 * one_expert, rel=1e-9)
    assert len(two.units[1].matrices) == 8 * 2
    assert pace.effort(two.units[1].matrices, "gram") == 8 * (64**3 + 192 * 64**2 + 96**3 + 64 * 96**2)
    # A Gram for each expert.
    assert sum(footprint.sums(two, "gram")) == 4 * (64**2 + 8 * 64**2 + 8 * 96**2)


def test_experts_in_a_list_are_experts_too():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(8, 4, bias=False)
            self.experts = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 6)) for _ in "1234"
            )

    (unit,) = workload._units(Experts(), "block", 1)
    assert sorted(unit.experts) == [(4, 6, 8), (4, 8, 8), (4, 8, 8)]
    assert (unit.weights, unit.active, unit.other) == (4 * 176, 176, 4 * 22 + 32)
    # Where the configuration does not say how many compute, all do.
    (unit,) = workload._units(Experts(), "block", None)
    assert unit.active == unit.weights


@pytest.mark.parametrize("name", ["num_experts_per_tok", "moe_topk", "moe_k"])
def test_the_number_of_experts_used_goes_by_several_names(name):
    assert workload.experts_used(SimpleNamespace(**{name: 3})) == 3
    assert workload.experts_used(SimpleNamespace(**{name: [2, 4]})) == 4
    assert workload.experts_used(SimpleNamespace(**{name: None})) is None


def test_the_line_without_recovery_costs_no_fit():
    found, work = shape(LARGE), Work(16, 2048)
    alone, fitted = (pace.of_pruning(found, work, RATES, again) for again in (False, True))
    twice = predict(found, replace(work, passes=2), RATES, True, "disk")
    assert {stage.name: stage.seconds for stage in twice.stages}["prune"] == pytest.approx(alone + fitted)


def test_graphs_of_all_blocks_are_alive_without_checkpoints():
    work = Work(16, 2048, steps=1)
    small, large = shape(LARGE), replace(shape(LARGE), blocks=160)
    kept = [footprint.of_retraining(one, replace(work, checkpointing=False)) for one in (small, large)]
    again = [footprint.of_retraining(one, work) for one in (small, large)]
    assert kept[1] - kept[0] > 5 * (again[1] - again[0])


def test_the_fastest_way_that_fits_is_chosen():
    found, work = shape(LARGE), Work(16, 2048, gpu=True)
    assert choose(found, work, RATES, AMPLE)[0].stream is False
    gpu = predict(found, work, RATES, True, "device").device
    chosen, fits = choose(found, work, RATES, replace(AMPLE, device=gpu))
    assert (chosen.stream, chosen.activations, fits) == (True, "device", True)
    chosen, fits = choose(found, work, RATES, replace(AMPLE, device=gpu - 1))
    assert (chosen.stream, chosen.activations, fits) == (True, "memory", True)
    chosen, fits = choose(found, work, RATES, replace(AMPLE, device=gpu - 1, host=chosen.host - 1))
    assert (chosen.stream, chosen.activations, fits) == (True, "disk", True)
    chosen = choose(found, work, RATES, AMPLE, stream=True)[0]
    assert (chosen.stream, chosen.ahead) == (True, True)
    assert choose(found, work, RATES, Budget(1, 1, 1))[1] is False
    assert choose(found, work, RATES, Budget(1, 1, 1), stream=False)[0].stream is False


def test_a_block_more_is_counted_where_it_is_read_ahead():
    found, work = shape(LARGE), Work(16, 2048, gpu=True)
    alone, ahead = (predict(found, work, RATES, True, "disk", ahead=ahead) for ahead in (False, True))
    assert ahead.device - alone.device == ahead.host - alone.host == found.block * found.itemsize
    assert ahead.seconds < alone.seconds
    assert not choose(found, replace(work, gpu=False), RATES, AMPLE, stream=True)[0].ahead


def test_packed_weights_go_to_memory_where_they_do_not_fit():
    found, work = shape(LARGE), Work(16, 2048, gpu=True, steps=4)
    whole = predict(found, work, RATES, True, "memory")
    packed = found.inside * (0.5 * 2 + 1 / 8)
    assert choose(found, work, RATES, replace(AMPLE, device=whole.device), stream=True)[0].offload is False
    chosen, fits = choose(found, work, RATES, replace(AMPLE, device=whole.device - 1), stream=True)
    assert fits
    assert chosen.offload
    (there,) = (stage for stage in chosen.stages if stage.name == "retrain")
    (here,) = (stage for stage in whole.stages if stage.name == "retrain")
    more = (chosen.ahead - whole.ahead) * found.block * 2
    assert here.device - there.device == pytest.approx(packed * 78 / 80 - more, rel=1e-3)
    assert there.host - here.host == pytest.approx(packed + more, rel=1e-3)
    assert not choose(found, replace(work, checkpointing=False), RATES, AMPLE, stream=True)[0].offload


def test_the_mildest_setting_that_helps_is_named():
    found, work = shape(LARGE), Work(128, 2048, batch=4, gpu=True)
    most = predict(found, work, RATES, True, "disk").device
    least = predict(found, replace(work, batch=1), RATES, True, "disk").device
    assert least < most
    assert advice(found, work, RATES, replace(AMPLE, device=least)) == "pass --reconstruct-batch 1"
    sparing = predict(found, replace(work, trained="mask_lora", batch=1), RATES, True, "disk").device
    assert sparing < least
    assert advice(found, work, RATES, replace(AMPLE, device=sparing)) == "pass --reconstruct-parts mask_lora,norms"
    assert advice(found, work, RATES, Budget(1, 1 << 50, 1 << 50)).endswith("GB of GPU memory")
    assert "on a disk with" in advice(found, work, RATES, replace(AMPLE, disk=1))


@pytest.mark.parametrize(
    "text, size", [("20GB", 20e9), ("16GiB", 16 * 2**30), ("1.5 tb", 1.5e12), ("700mb", 7e8), ("8", 8e9), ("9b", 9)]
)
def test_sizes_of_memory(text, size):
    assert machine.parse_size(text) == math.floor(size)
    assert machine.parse_size(None) is None
    for wrong in ("", "GB", "-1GB", "0", "4 EB", "1e3"):
        with pytest.raises(Exception, match="not a size of memory"):
            machine.parse_size(wrong)


def test_the_headlines_are_planned_for():
    """The reach of the papers' sizes on one GPU, as planned from configurations: no measurement stands behind it."""
    opt = OPTConfig(
        vocab_size=50272,
        hidden_size=7168,
        ffn_dim=28672,
        num_hidden_layers=48,
        num_attention_heads=56,
        word_embed_proj_dim=7168,
    )
    work = Work(128, 2048, gpu=True)
    assert predict(shape(opt), work, RATES, True, "memory").device < 8e9
    assert predict(shape(LARGE), work, RATES, True, "memory").device < 12e9
