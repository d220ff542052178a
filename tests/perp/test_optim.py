import math

import pytest
import torch
from torch import nn

from perp.errors import UserError
from perp.optim import AdamW, learning_rate


def test_schedule_by_its_formula() -> None:
    rates = [learning_rate(i, 20, 1.0, warmup=0.1) for i in range(20)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == pytest.approx([(20 - i) / 18 for i in range(2, 20)])
    assert learning_rate(20, 20, 1.0) == 0


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 64, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_schedule_peaks_once_at_lr_and_never_idles(steps: int, warmup: float) -> None:
    rates = [learning_rate(i, steps, 3e-4, warmup) for i in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == 3e-4
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert top == math.floor(warmup * steps)


def adam_by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """Adam in float64 from its definition (Kingma and Ba 2015, algorithm 1) under the schedule."""
    w, m, v = (
        weight.double(),
        torch.zeros_like(weight, dtype=torch.float64),
        torch.zeros_like(weight, dtype=torch.float64),
    )
    for i, gradient in enumerate(gradients):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        w = w - learning_rate(i, len(gradients), lr) * step
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_update_is_adam_in_fp32_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(50).to(dtype))
    start = parameter.detach().clone()
    gradients = [torch.randn(50).to(dtype) for _ in range(12)]
    optimiser = AdamW([parameter], lr=1e-4, steps=12, dtype=dtype)
    for gradient in gradients:
        optimiser.step([lambda g=gradient: (parameter * g).float().sum()])
    exact = adam_by_hand(start, gradients, 1e-4)
    assert parameter.dtype == dtype
    assert (parameter.double() - exact).abs().max() <= torch.finfo(dtype).eps * start.abs().max() + 1e-6
    master = optimiser.masters[0]
    assert (master.double() - exact).abs().max() <= 1e-6
    assert not torch.equal(master, start.float())  # 1e-4 is below the last bit of most bf16 weights: the copy moves on


def test_micro_batches_add_up_in_fp32() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimiser = AdamW([parameter], lr=1.0, steps=1)
    optimiser.adam.step = lambda: gradients.append(optimiser.masters[0].grad.clone())  # type: ignore[method-assign]
    gradients: list[torch.Tensor] = []
    losses = [lambda: parameter.float().sum() * 256] + [lambda: parameter.float().sum()] * 3
    assert optimiser.step(losses) == 3 * 256 + 9
    assert torch.equal(gradients[0], torch.full((3,), 259.0))  # bf16 has no 257: adding ones there stays at 256


def test_gradients_from_before_do_not_count() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), -1.0)
    AdamW([parameter], lr=1.0, steps=1).step([lambda: parameter.sum() * 1e-3])
    assert parameter.item() < 0
    assert parameter.grad is None


def test_float16_underflow_is_scaled_away() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimiser = AdamW([parameter], lr=0.5, steps=1, dtype=torch.float16)
    optimiser.step([lambda: (parameter * torch.tensor(1e-4, dtype=torch.float16)).float().sum() * 1e-4])
    # The gradient is 1e-8, nothing in float16 and as large as Adam's eps: half the rate, once it has survived.
    torch.testing.assert_close(parameter.float(), torch.full((4,), -0.25), rtol=0.01, atol=0)


def test_float16_overflow_repeats_the_step_at_half_the_scale() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimiser = AdamW([parameter], lr=0.5, steps=2, dtype=torch.float16)
    calls = 0

    def loss() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (parameter * torch.tensor(100.0, dtype=torch.float16)).float().sum()

    optimiser.step([loss])
    assert optimiser.scale == 512  # 100 x 1024 exceeds float16's 65504
    assert calls == 8
    assert optimiser.taken == 1
    assert torch.equal(parameter, torch.full((4,), -0.5, dtype=torch.float16))
    optimiser.step([loss])
    assert calls == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_rate(bad: float) -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimiser = AdamW([parameter], lr=0.25, steps=3)
    optimiser.step([lambda: parameter.sum()])
    before = parameter.detach().clone()
    with pytest.raises(UserError, match=rf"loss became {bad} in step 2 of 3 at learning rate 0\.167"):
        optimiser.step([lambda: parameter.sum() * bad])
    assert torch.equal(parameter, before)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="gradient became infinite or NaN in step 1 of 1"):
        AdamW([parameter], lr=1.0, steps=1).step([lambda: parameter.sqrt().sum()])
    assert parameter.item() == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"lr": 0.0}, "learning rate is 0.0"),
        ({"lr": float("nan")}, "learning rate is nan"),
        ({"steps": 0}, "number of steps is 0"),
        ({"warmup": 1.0}, "warm-up share is 1.0"),
        ({"parameters": []}, "nothing to train"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    good = {"parameters": [nn.Parameter(torch.ones(1))], "lr": 1.0, "steps": 1}
    with pytest.raises(UserError, match=message):
        AdamW(**{**good, **arguments})  # type: ignore[arg-type]
