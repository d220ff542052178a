import dataclasses
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from perp import adamw8bit, adapters, resume, retrain
from perp.adamw8bit import AdamW8bit
from perp.cli import app
from perp.errors import UserError
from perp.linear import SparseLinear, unswap
from perp.optim import AdamW
from perp.retrain import RetrainSettings
from perp.settings import RunSettings

from . import families, tiny
from .test_cli import SMALL
from .test_resume import Interrupt

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")

# Large enough for 8 bits in nearly every matrix, embeddings and head included.
LARGER = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}


def settings(**changes) -> RetrainSettings:
    return RetrainSettings(
        **{"parts": ("full",), "steps": 7, "batch": 2, "lr": 1e-3, "optimizer": "adamw8bit", **changes}
    )


def larger(family: str = "llama", **changes):
    return families.pruned(family, **{**LARGER, **changes})


def dynamic_map(signed: bool) -> Tensor:
    """The 8-bit dynamic data type of the paper (section 1.3), float64 [256]: seven decades, each with twice the
    equally spaced numbers of the one below it, 0 and 1."""
    decades = []
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        middles = 0.1 + 0.9 * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        decades.append(middles * 10.0 ** (decade - 6))
    positive = torch.cat(decades)
    both = [positive, -positive] if signed else [positive]
    return torch.cat([*both, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values


def rounded(values: Tensor, signed: bool) -> Tensor:
    """Each block of 256 scaled by its largest magnitude, rounded to the nearest number of the map."""
    blocks = values.view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)
    known = dynamic_map(signed)
    nearest = (blocks / scale.clamp_min(1e-300))[..., None].sub(known).abs().argmin(-1)
    return (known[nearest] * scale).flatten()


def by_hand(weight: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    """AdamW in float64 whose moments are rounded after each step; a first moment without a second is 0."""
    w = weight.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for i, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - rate * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        m, v = rounded(m, True), rounded(v, False)
        m[v == 0] = 0
    return w


def steps(optimiser: AdamW8bit, tensor: Tensor, gradients: list[Tensor], rates: list[float]) -> None:
    for gradient, rate in zip(gradients, rates, strict=True):
        tensor.grad = gradient.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()


@needs_torchao
def test_steps_are_those_of_float64_with_moments_of_the_papers_map(monkeypatch):
    """Over two pieces of a tensor and what is left after the last block, with gradients of many magnitudes."""
    monkeypatch.setattr(adamw8bit, "PIECE", 8192)
    torch.manual_seed(0)
    count = 8192 + 4096 + 77
    weight = torch.randn(count)
    gradients = [torch.randn(count) * 10 ** torch.empty(count).uniform_(-5, 0) * 1e-2 for _ in range(4)]
    rates = [1e-3, 4e-3, 2e-3, 1e-3]
    tensor = weight.clone()
    steps(AdamW8bit([tensor], lr=1.0), tensor, gradients, rates)
    whole = by_hand(weight[:-77], [gradient[:-77] for gradient in gradients], rates)
    error = (tensor[:-77].double() - whole).abs()
    # A moment between two numbers of the map may be rounded to the other one in fp32.
    assert (error > 1e-6).float().mean() < 2e-3
    assert error.max() < max(rates)
    moved = (whole - weight[:-77].double()).abs()
    assert moved.median() > 1e-3
    plain = weight[-77:].clone()
    adam = torch.optim.AdamW([plain], weight_decay=0.0)
    for gradient, rate in zip(gradients, rates, strict=True):
        plain.grad, adam.param_groups[0]["lr"] = gradient[-77:].clone(), rate
        adam.step()
    torch.testing.assert_close(tensor[-77:], plain, rtol=0, atol=1e-6)


@needs_torchao
def test_moments_take_little_more_than_two_bytes():
    tensor = torch.randn(1000, 1100)
    optimiser = AdamW8bit([tensor], lr=1e-3)
    steps(optimiser, tensor, [torch.randn_like(tensor)], [1e-3])
    held = [value for state in optimiser.large.state.values() for value in state.values()]
    held = [getattr(one, name) for one in held for name in getattr(one, "tensor_attrs", ["data"])]
    assert 2.0 < sum(one.nbytes for one in held) / tensor.numel() < 2.1
    small = torch.randn(4095)
    optimiser = AdamW8bit([small], lr=1e-3)
    steps(optimiser, small, [torch.randn(4095)], [1e-3])
    assert optimiser.state_dict()["small"]["state"][0]["exp_avg"].dtype == torch.float32


@needs_torchao
def test_numbers_of_zero_gradient_stay_to_the_bit():
    torch.manual_seed(0)
    tensor, still = torch.randn(64, 128), torch.rand(64, 128) < 0.5
    tensor[still & (torch.rand(64, 128) < 0.5)] = 0
    before = tensor.clone()
    # A gradient times a mask of zeros is -0 where it was negative.
    gradients = [torch.randn(64, 128) * ~still for _ in range(5)]
    gradients[2][32:] = 0
    assert torch.signbit(gradients[0][still]).any()
    steps(AdamW8bit([tensor], lr=1.0), tensor, gradients, [1e-2] * 5)
    assert torch.equal(tensor[still].view(torch.int32), before[still].view(torch.int32))
    assert not (tensor == before)[~still].any()


@needs_torchao
def test_a_gradient_that_ceases_moves_nothing_far():
    """Small gradients beside large ones leave a second moment of 0, and the first one alone is thousands of rates."""
    torch.manual_seed(0)
    tensor = torch.zeros(4096)
    gradients = [torch.randn(4096) * 10 ** torch.empty(4096).uniform_(-6, 0), torch.zeros(4096)]
    steps(AdamW8bit([tensor], lr=1.0), tensor, gradients, [1e-3, 1e-3])
    # In fp32 two steps come to 1.67 rates; here the second counts a moment whose rounding may be two thirds of it.
    assert tensor.abs().max() < 2.5e-3


@needs_torchao
@pytest.mark.parametrize("family,changes", [("llama", {}), ("qwen2-moe", {"num_experts": 8})])
def test_full_training_does_as_well_as_with_fp32_moments(family: str, changes: dict[str, int]):
    """Of a batch of 8 tokens most embeddings, and some experts, have no gradient."""
    windows = torch.randint(3, 256, (16, 8), generator=torch.Generator().manual_seed(1))

    def lowered(optimizer: str) -> float:
        model = larger(family, **changes)
        before = families.full_loss(model, windows).item()
        retrain.retrain(model, windows, settings(steps=16, batch=1, lr=2e-3, optimizer=optimizer))
        return before - families.full_loss(model, windows).item()

    fp32, eight = lowered("adamw"), lowered("adamw8bit")
    assert fp32 > 0.5
    assert abs(eight - fp32) < 0.02 * fp32


@needs_torchao
@pytest.mark.parametrize("parts,dtype", [(("kept", "norms"), torch.float32), (("mask_lora", "norms"), torch.bfloat16)])
def test_every_zero_is_kept(parts: tuple[str, ...], dtype: torch.dtype):
    model = larger(dtype=dtype)
    masks = {n: m.sparse_weight.mask() for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    windows = families.windows(4, 12)
    losses = retrain.retrain(model, windows, settings(parts=parts, steps=12, lr=4e-3, r=64))
    assert losses[-1] < losses[0] - 0.1
    adapters.merge(model)
    unswap(model)
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any(), name


@needs_torchao
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "parts": ("kept", "norms")}])
def test_an_interrupted_training_goes_on_to_the_same_bits(changes, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    chosen, file = settings(**changes), tmp_path / "retrain.pt"
    whole, windows = larger(), families.windows()
    losses = retrain.retrain(whole, windows, chosen)
    with pytest.raises(KeyboardInterrupt):
        retrain.retrain(larger(), windows, chosen, Interrupt(3), checkpoint=file)
    large = torch.load(file, weights_only=True)["optimiser"]["adam"]["large"]
    assert all(state["exp_avg"]["codes"].dtype == torch.uint8 for state in large)
    fp32 = dataclasses.replace(chosen, optimizer="adamw")
    with pytest.raises(UserError, match="is of another training"):
        retrain.retrain(larger(), windows, fp32, checkpoint=file)
    again = larger()
    assert retrain.retrain(again, windows, chosen, checkpoint=file) == losses
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@needs_torchao
def test_float16_overflow_takes_no_step():
    parameter = nn.Parameter(torch.zeros(8192, dtype=torch.float16))
    optimiser = AdamW([parameter], lr=0.5, steps=2, dtype=torch.float16, optimizer="adamw8bit")
    optimiser.step([lambda: (parameter * torch.tensor(100.0, dtype=torch.float16)).float().sum()])
    assert optimiser.scale == 512  # 100 x 1024 exceeds float16's 65504
    assert torch.equal(parameter, torch.full((8192,), -0.5, dtype=torch.float16))


@needs_torchao
def test_what_has_no_gradient_yet_stays_and_goes_on_from_a_checkpoint():
    torch.manual_seed(0)
    first, late = torch.randn(5000), torch.randn(70, 80)
    optimiser = AdamW8bit([first, late], lr=1e-3)
    before, gradients = late.clone(), [torch.randn(5000) for _ in range(3)]
    steps(optimiser, first, gradients[:2], [1e-3, 1e-3])
    assert torch.equal(late, before)
    other, later = first.clone(), late.clone()
    again = AdamW8bit([other, later], lr=1e-3)
    again.load_state_dict(optimiser.state_dict())
    late.grad, later.grad = (torch.ones(70, 80) for _ in range(2))
    steps(optimiser, first, gradients[2:], [1e-3])
    steps(again, other, gradients[2:], [1e-3])
    assert torch.equal(first, other)
    assert torch.equal(late, later)
    assert math.isclose((before - late).mean().item(), 1e-3, rel_tol=1e-3)


def test_without_torchao_it_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch):
    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    for order in ("run", "plan"):
        result = CliRunner().invoke(app, [order, "nowhere", "--optimizer", "adamw8bit", "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert result.stderr == "perp: the optimizer adamw8bit needs torchao: pip install 'perp[adamw8bit]'.\n"
    with pytest.raises(UserError, match="needs torchao"):
        RetrainSettings(optimizer="adamw8bit")


def test_an_unknown_optimizer_is_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["run", "demo", "--optimizer", "lion", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr == "perp: optimizer cannot be 'lion'; choose among adamw, adamw8bit.\n"
    for make in (
        lambda: RetrainSettings(optimizer="lion"),
        lambda: AdamW([nn.Parameter(torch.ones(1))], 1.0, 1, optimizer="lion"),
    ):
        with pytest.raises(UserError, match="'lion' is not an optimizer; choose one of adamw, adamw8bit"):
            make()


@needs_torchao
def test_a_run_uses_it_and_tells_nothing_of_the_library(tmp_path: Path):
    assert RunSettings("demo", tmp_path, optimizer="adamw8bit").for_retrain.optimizer == "adamw8bit"
    places = [str(Path(importlib.util.find_spec("torchao").origin).parents[1]), os.environ.get("PYTHONPATH", "")]
    model, text = tiny.model_dir(tmp_path), tiny.text_file(tmp_path)
    words = ["--retrain", "full", "--optimizer", "adamw8bit", "--granularity", "none", "--compare", "none", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "perp", "run", model, "--data", text, "--out", tmp_path / "out", *words, *SMALL],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("perp: ") for line in done.stderr.splitlines()), done.stderr
    assert json.loads((tmp_path / "out" / "perp.json").read_text())["settings"]["optimizer"] == "adamw8bit"


def test_where_nothing_compiles_it_runs_uncompiled(caplog):
    # Not by monkeypatch, which takes the option away at the end rather than give it its value back.
    with torch._dynamo.config.patch(disable=True), caplog.at_level(logging.WARNING, logger="perp"):
        assert not adamw8bit.compiles(torch.device("cpu"))
    assert "adamw8bit runs uncompiled" in caplog.text
