import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from perp import adapters, parts, retrain
from perp.errors import UserError
from perp.linear import SparseLinear, unswap
from perp.loss import WindowLoss
from perp.progress import Silent
from perp.retrain import RetrainSettings

from . import families
from .families import full_loss, pruned

# Heads of all kinds: plain, soft-capped (gemma2), with a bias (phi), behind a projection (opt-post-norm).
HEADS = ["llama", "gemma2", "phi", "opt-post-norm"]
SETTINGS = RetrainSettings(steps=6, batch=2, lr=1e-2, r=2, alpha=4)


@pytest.mark.parametrize(
    "family,dtype", [*((family, torch.float32) for family in HEADS), ("llama", torch.bfloat16), ("opt", torch.float16)]
)
def test_training_lowers_the_loss_and_keeps_every_zero(family: str, dtype: torch.dtype) -> None:
    model = pruned(family, dtype)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "embed" in n or n.endswith("head.weight")}
    masks = {n: m.sparse_weight.mask() for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    windows = families.windows(2, 12)
    losses = retrain.retrain(model, windows, dataclasses.replace(SETTINGS, steps=12))
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    assert not model.training
    for name, parameter in frozen.items():
        assert torch.equal(model.get_parameter(name), parameter)
    adapters.merge(model)
    unswap(model)
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert full_loss(model, windows) < losses[0] - 0.1


@pytest.mark.parametrize(
    "chosen_parts",
    [
        {"norms"},
        {"biases"},
        {"kept"},
        {"full"},
        {"head"},
        {"mask_lora", "biases"},
        {"scale_lora", "head"},
        {"spp"},
        {"lora_prune"},
        {"lora", "norms"},
    ],
    ids=lambda p: "+".join(sorted(p)),
)
def test_only_the_chosen_parts_move(chosen_parts: set[str]) -> None:
    model = pruned("opt")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    retrain.retrain(model, families.windows(), dataclasses.replace(SETTINGS, parts=chosen_parts))
    chosen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {n for n, p in model.named_parameters() if n not in before or not torch.equal(p, before[n])}
    assert moved == chosen
    assert chosen


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_repeats_bitwise_whatever_the_global_generator_did(dropout: float, checkpointing: bool) -> None:
    def once(noise: int) -> tuple[list[float], list[Tensor]]:
        model = pruned("opt", dropout=dropout)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        losses = retrain.retrain(
            model, families.windows(), dataclasses.replace(SETTINGS, checkpointing=checkpointing, micro_batch=2)
        )
        assert torch.equal(torch.get_rng_state(), state)
        return losses, [p.detach() for p in model.parameters()]

    (losses, first), (again, second) = once(0), once(1)
    assert losses == again
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("family", HEADS)
def test_checkpointing_changes_memory_and_not_the_numbers(family: str) -> None:
    def saved(checkpointing: bool) -> tuple[list[float], int]:
        model = pruned(family)
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = retrain.retrain(
                model, families.windows(), dataclasses.replace(SETTINGS, steps=2, checkpointing=checkpointing)
            )
        return losses, kept

    with_, without = saved(True), saved(False)
    assert with_[0] == without[0]
    assert with_[1] < without[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_micro_batches_give_the_same_training(dtype: torch.dtype) -> None:
    def train(micro_batch: int) -> tuple[list[float], Tensor]:
        model = pruned(dtype=dtype)
        settings = dataclasses.replace(SETTINGS, batch=4, steps=3, micro_batch=micro_batch)
        losses = retrain.retrain(model, families.windows(5), settings)
        return losses, torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])

    (whole, parameters), *others = (train(size) for size in (4, 1, 2, 3))
    rounding = torch.finfo(dtype).eps
    for losses, found in others:
        assert losses == pytest.approx(whole, rel=8 * rounding)
        # Adam turns a gradient of rounding size into a whole step, so the bound is on the norm.
        assert (found - parameters).norm() <= 100 * rounding * parameters.norm()


def test_full_trains_a_tied_embedding_by_both_its_uses_and_keeps_the_masks() -> None:
    """One step of SGD's direction: the gradient of the whole model's own loss, pruned weights apart."""
    model = pruned("opt")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    masks = {n: m.sparse_weight.mask() for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    ids = families.windows(2)
    parts.select_trainable(model, {"full"})
    full_loss(model, ids).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (WindowLoss(model)(ids, 1 / (2 * (ids.shape[1] - 1)))).backward()
    assert expected.keys() == {n for n, p in model.named_parameters() if p.is_floating_point()}
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
    model.zero_grad()
    retrain.retrain(model, ids, dataclasses.replace(SETTINGS, parts={"full"}))
    unswap(model)
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()


def test_windows_are_drawn_by_seeded_permutations() -> None:
    seen: list[list[int]] = []

    class Watch(Silent):
        def unit(self, name: str, **figures: float) -> None:
            units.append((name, figures))

    units: list[tuple[str, dict[str, float]]] = []
    model = pruned()
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    windows = families.windows(7)
    windows[:, 0] = torch.arange(7)
    settings = dataclasses.replace(SETTINGS, steps=5, batch=2, micro_batch=2, parts={"norms"}, seed=1)
    losses = retrain.retrain(model, windows, settings, Watch())
    generator = torch.Generator().manual_seed(1)
    order = [*torch.randperm(7, generator=generator).tolist(), *torch.randperm(7, generator=generator).tolist()]
    assert [number for batch in seen if len(batch) == 2 for number in batch] == order[:10]
    assert [name for name, _ in units] == [f"step {number}" for number in range(1, 6)]
    assert [figures["loss"] for _, figures in units] == losses
    assert all(figures["tokens/s"] > 0 for _, figures in units)


def test_the_first_loss_is_the_untrained_models() -> None:
    model = pruned()
    windows = families.windows(4)
    expected = full_loss(model, windows)
    losses = retrain.retrain(copy.deepcopy(model), windows, dataclasses.replace(SETTINGS, steps=1, batch=4))
    assert losses == [pytest.approx(expected.item(), rel=1e-5)]


def test_adapters_already_there_are_trained_on() -> None:
    model = pruned()
    adapters.attach(model, r=3)
    retrain.retrain(model, families.windows(), SETTINGS)
    assert {m.lora_A.shape[0] for m in model.modules() if isinstance(m, SparseLinear)} == {3}


def test_divergence_names_step_and_rate() -> None:
    model = pruned()
    settings = dataclasses.replace(SETTINGS, parts={"norms"}, lr=1e30, steps=4, warmup=0.0)
    with pytest.raises(UserError, match=r"in step 2 of 4 at learning rate 7\.5e\+29; train with a smaller"):
        retrain.retrain(model, families.windows(), settings)
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    "windows,message",
    [
        (torch.zeros(0, 8, dtype=torch.int64), r"\[0, 8\]; they must be int64 \[n, T\]"),
        (torch.zeros(2, 1, dtype=torch.int64), "at least two tokens"),
        (torch.zeros(8, dtype=torch.int64), "must be int64"),
        (torch.full((2, 8), math.nan), r"torch\.float32 \[2, 8\]; they must be int64"),
        (torch.full((2, 8), families.VOCABULARY), "tokens 96 to 96, but the model knows 0 to 95"),
        (torch.full((2, 8), -1), "tokens -1 to -1"),
    ],
)
def test_bad_windows(windows: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        retrain.retrain(pruned(), windows, SETTINGS)


def test_bad_settings() -> None:
    for wrong, message in (
        ({"lr": 0.0}, "learning rate is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "at least one window"),
        ({"parts": {"heads"}}, "'heads' is not a part"),
        ({"parts": set()}, "nothing is chosen to train"),
        ({"parts": {"kept", "mask_lora"}}, "train the same weights"),
        ({"parts": {"full", "head"}}, "full.* trains the head itself"),
        ({"distil": 1.5}, "weight of distillation is 1.5"),
        ({"distil": 0.5, "temperature": 0.0}, "temperature of distillation is 0.0"),
        ({"distil": 0.5}, "needs a teacher"),
        ({"precision": "fp8"}, "'fp8' is not a precision"),
        ({"r": 0}, "rank is 0"),
    ):
        with pytest.raises(UserError, match=message):
            retrain.retrain(pruned(), families.windows(), dataclasses.replace(SETTINGS, **wrong))
