"""How fast this machine does each kind of work of a job: one block, much like the model's, is pruned and fitted.

The block is a stand-in of plain torch, no wider than `WIDTH`, so that the probe takes about as long for any model. Its
weights and tokens are few, the code that works on them is that of the job.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perp_kernels as pk
from perp import distributed, machine, pruners
from perp.adapters import attach
from perp.blocks import prunable
from perp.choice import Choice
from perp.linear import swap_linears
from perp.optim import AdamW
from perp.pace import Rates, effort, forward_flops
from perp.parts import adapter_mode, trainable
from perp.reconstruct import ReconstructSettings
from perp.reconstruct import reconstruct as fit
from perp.settings import RunSettings
from perp.statistics import collect
from perp.units import split, whole
from perp.workload import Shape

# Wider blocks run at nearly the rate of this width on a CPU; a GPU needs larger products to be busy.
WIDTH = {"cpu": 512, "cuda": 2048}
# At most so many tokens of a window: a step also costs what grows with the weights alone, which few tokens overstate.
TOKENS = {"cpu": 512, "cuda": 2048}
# Of a head of other work, as many outputs as show its rate.
VOCABULARY = 8192
# Training steps by which one fit is longer than another, to tell steps from what each fit takes once.
MORE = 4
# Measurements of each kind, in turns; the median counts. One more before them has torch and the kernels prepared.
ROUNDS = 3
# Seconds after which no further round begins.
ENOUGH = 3.0
# Of a disk that nothing has been read from yet: that of a plain NVMe drive.
DISK = 1.5e9
_HEAD = 64


@distributed.alone()
def measure(job: RunSettings, shape: Shape, device: str) -> Rates:
    """The rates of this job's work.

    On a CPU times are those of the calling thread's processor, which other work on the machine does not lengthen;
    `busy` is what that other work makes of them now.
    """
    kind = torch.device(device).type
    dtype = {2: torch.bfloat16, 8: torch.float64}.get(shape.itemsize, torch.float32)
    tokens = min(job.seqlen or machine.usual_sizes(device)[1], TOKENS[kind])
    with torch.random.fork_rng([device] if kind == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        subject = _Subject(job, _stand_in(shape, WIDTH[kind], dtype), tokens, min(shape.vocabulary, VOCABULARY))
    work: dict[str, Callable[[], object]] = {
        "forward": subject.forward,
        "gram": subject.gram,
        "choose": subject.choose,
        "fit": lambda: subject.fit(1),
        "fit on": lambda: subject.fit(1 + MORE),
        "update": subject.update,
        "retrain": subject.retrain,
        "head": subject.head,
        "lesson": subject.lesson,
        "teach": subject.teach,
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    own = elapsed = 0.0
    begun = time.perf_counter()
    for turn in range(ROUNDS + 1):
        for name, call in work.items():
            seconds, wall = _timed(call, kind)
            if turn:
                taken[name].append(seconds)
                own, elapsed = own + seconds, elapsed + wall
        if turn and time.perf_counter() - begun > ENOUGH:
            break
    rates = subject.rates({name: statistics.median(times) for name, times in taken.items()})
    return replace(rates, busy=max(1.0, elapsed / own))


class _Subject:
    """A dense block with what the job's work on it needs; every call leaves it as it was, but for numbers."""

    def __init__(self, job: RunSettings, block: nn.Module, tokens: int, vocabulary: int) -> None:
        self.job, self.block = job, block
        self.pruner, self.pattern = pruners.resolve(job.method, job.pattern)
        if self.pattern.m and _HEAD % self.pattern.m:  # which would not divide the stand-in, and takes as long
            self.pattern = pk.Pattern.parse("2:4")
        weight = next(block.parameters())
        self.width = weight.shape[-1]
        self.tokens, self.vocabulary = tokens, vocabulary
        self.hidden = torch.randn(1, tokens, self.width).to(weight.dtype)
        self.target = torch.randn(1, tokens, self.width).to(weight.dtype)
        self.embedding = torch.randn(vocabulary, self.width).to(weight.dtype)
        self.labels = torch.arange(tokens) % vocabulary
        linears = prunable(block, "block")
        self.dense = {name: linear.weight.data for name, linear in linears.items()}
        with torch.no_grad():
            halves = split(block, "block", self.hidden, _plain([0]))
        self.units = halves if job.reconstruct == "half-block" else [whole(block, "block")]
        self.choice = Choice(self.pruner, job.for_refine, job.refit, {})
        self.read = collect(block, linears, [self.hidden], _plain, self.choice.needs or "norms")
        # The sums of so few tokens serve as those of held-out windows, too.
        for sums in self.read.values():
            sums.held_out = replace(sums) if job.for_refine else None
        self.choose()
        kept = sum(int(mask.sum()) for mask in self.choice.masks.values())
        self.kept = nn.Parameter(torch.zeros(kept, dtype=weight.dtype))
        self.optimiser = AdamW([self.kept], 1e-3, 1 << 20)
        self.adapted = _retrained(block, self.choice.masks, job)
        narrow = torch.bfloat16 if job.precision == "bf16" and weight.dtype.itemsize > 2 else weight.dtype
        self.x = self.hidden.to(narrow, copy=True).requires_grad_()
        self.narrow_embedding = self.embedding.to(narrow)
        self.dense_block = copy.deepcopy(block).to(narrow).requires_grad_(False)

    def forward(self) -> None:
        collect(self.block, prunable(self.block, "block"), [self.hidden], _plain, "norms")

    def gram(self) -> None:
        pk.gram_(torch.zeros(self.width, self.width, device=self.hidden.device), self.hidden[0])

    @torch.no_grad()
    def choose(self) -> None:
        for name, linear in prunable(self.block, "block").items():  # new ones after each fit
            linear.weight.data = self.dense[name]
        for unit in self.units:
            self.choice.prune(unit, self.read, self.pattern)

    def fit(self, epochs: int) -> None:
        settings = self.job.for_reconstruct or ReconstructSettings()
        for unit in self.units:
            fit(
                unit,
                self.choice.masks,
                [self.hidden],
                [self.target],
                _plain,
                replace(settings, epochs=epochs, batch=1),
                keep_targets=True,
            )

    def update(self) -> None:
        self.optimiser.step([self.kept.sum])

    def retrain(self) -> None:
        if self.job.checkpointing:
            output: Any = checkpoint(self.adapted, self.x, use_reentrant=False)
        else:
            output = self.adapted(self.x)
        output.float().square().mean().backward()

    @torch.no_grad()
    def head(self) -> None:
        F.cross_entropy(F.linear(self.hidden[0], self.embedding).float(), self.labels)

    def lesson(self) -> None:
        """The head's part of a training step, as `perp.loss` and `perp.distil` have it."""

        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, self.labels, reduction="sum")

        def both(logits: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = F.log_softmax(F.linear(self.x[0], self.narrow_embedding).float(), dim=-1)
            divergence = F.kl_div(F.log_softmax(logits, dim=-1), wanted, log_target=True, reduction="sum")
            return loss(logits) + divergence

        part = self.x[0].detach().requires_grad_()
        logits = F.linear(part, self.narrow_embedding).float()
        torch.autograd.grad(both(logits) if self.job.distil else loss(logits), [part])

    @torch.no_grad()
    def teach(self) -> None:
        self.dense_block(self.x)

    def rates(self, seconds: dict[str, float]) -> Rates:
        weights = sum(weight.numel() for weight in self.dense.values())
        sizes = [(len(weight), weight.shape[1]) for weight in self.dense.values()]
        logits = 2.0 * self.tokens * self.vocabulary * self.width
        passed = forward_flops(self.tokens, self.tokens, weights, self.width)
        step = max(seconds["fit on"] - seconds["fit"], 1e-9) / MORE
        update = seconds["update"] / self.kept.numel()
        if "kept" in self.job.reconstruct_parts:
            # What grows with the tokens alone.
            step = max(step - seconds["update"], step / 4)
        once = seconds["fit"] - step - 2 * seconds["forward"] - seconds["update"]
        return Rates(
            forward=passed / seconds["forward"],
            fit=passed / step,
            retrain=passed / seconds["retrain"],
            head=logits / seconds["head"],
            lesson=logits / seconds["lesson"],
            teach=passed / seconds["teach"],
            gram=2 * self.tokens * self.width**2 / seconds["gram"],
            choose=effort(sizes, self.choice.needs) / seconds["choose"],
            pack=weights / max(once, seconds["fit"] / 100),
            update=1 / update,
            disk=DISK,
        )


class _Norm(nn.Module):
    """As models of transformers compute it: in fp32, an operation at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(hidden.dtype)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (-1, _HEAD)).transpose(1, 2) for one in (self.q, self.k, self.v))
        q, k = (torch.cat((-one[..., _HEAD // 2 :], one[..., : _HEAD // 2]), -1) * 0.6 + one * 0.8 for one in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.attention = _Norm(width), _Attention(width)
        self.second_norm, self.mlp = _Norm(width), _Mlp(width, inner)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden + self.mlp(self.second_norm(hidden))


def _stand_in(shape: Shape, most: int, dtype: torch.dtype) -> nn.Module:
    """A block of the model's width, or `most`, with its share of weights in the MLP."""
    width = max(_HEAD, min(shape.hidden, most) // _HEAD * _HEAD)
    beyond = sum(unit.active for unit in shape.units) / shape.hidden**2 - 4
    inner = max(_HEAD, round(width * beyond / 3 / _HEAD) * _HEAD)
    return _Block(width, min(inner, 8 * width)).to(dtype).eval()


def _retrained(block: nn.Module, masks: Mapping[str, Tensor], job: RunSettings) -> nn.Module:
    """A copy of the pruned block as it is retrained."""
    copied = copy.deepcopy(block)
    swap_linears(copied, {name.removeprefix("block."): mask for name, mask in masks.items()})
    if job.precision == "bf16":
        copied = copied.bfloat16()
    if mode := adapter_mode(job.retrain):
        attach(copied, mode, job.rank, job.alpha)
    copied.requires_grad_(False)
    for parameter in trainable(copied.modules(), set(job.retrain) - {"head"}):
        parameter.requires_grad_(True)
    return copied


def _plain(_: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Nothing but the hidden state goes into the block."""
    return (), {}


def _timed(call: Callable[[], object], kind: str) -> tuple[float, float]:
    """Seconds of the work itself, and on the clock."""
    begun, own = time.perf_counter(), time.thread_time()
    call()
    if kind == "cpu":
        return time.thread_time() - own, time.perf_counter() - begun
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - begun
    return elapsed, elapsed
