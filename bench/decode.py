"""`python -m bench.decode`: tokens/s of an 8B-shaped model at batch 1 on a GPU: dense, 2:4 on sparse tensor cores, and
pruned by half as a bitmap.

Random weights; every linear layer but the head is pruned. A step, one token against a full cache, is captured in a CUDA
graph and replayed, a pruned model and the dense one in turns. A decoder of its own, with torch's operators and nothing
that asks the host: what is compared are the linear layers. The rows go to bench/results/DEVICE.json.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perp
import perp_kernels as pk
from bench import machine, results
from bench.results import Row
from perp_kernels import dispatch

OP, DENSE = "decode", "torch dense"
ROUNDS, STEPS = 9, 20


@dataclass(frozen=True)
class Pattern:
    """What is pruned, how it is held, the op that serves it, and how many times the dense speed is asked for."""

    name: str
    layout: str
    op: str
    target: float | None


PATTERNS = (Pattern("2:4", "semi24", "tiled24_linear", 1.4), Pattern("0.5/row", "bitmap", "sparse_linear", None))


@dataclass(frozen=True)
class Size:
    """Llama 3's 8B unless told otherwise; `context` tokens are in the cache."""

    width: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    groups: int = 8
    vocabulary: int = 128256
    context: int = 512


class Layer(nn.Module):
    keys: Tensor
    values: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, head = size, size.width // size.heads
        self.before, self.between = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.q = nn.Linear(size.width, size.width, bias=False)
        self.k = nn.Linear(size.width, size.groups * head, bias=False)
        self.v = nn.Linear(size.width, size.groups * head, bias=False)
        self.o = nn.Linear(size.width, size.width, bias=False)
        self.gate = nn.Linear(size.width, size.inner, bias=False)
        self.up = nn.Linear(size.width, size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.width, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, size.groups, size.context, head))
        angles = size.context / 10000 ** (torch.arange(0, head, 2) / head)
        self.register_buffer("cosine", angles.cos().repeat(2))
        self.register_buffer("sine", angles.sin().repeat(2))

    def rotated(self, heads: Tensor) -> Tensor:
        low, high = heads.chunk(2, dim=-1)
        return heads * self.cosine + torch.cat([-high, low], dim=-1) * self.sine

    def forward(self, x: Tensor) -> Tensor:
        """x [1, width]."""
        size, head = self.size, self.size.width // self.size.heads
        normed = self.before(x)
        q = self.rotated(self.q(normed).view(1, size.heads, 1, head))
        self.keys[:, :, -1:] = self.rotated(self.k(normed).view(1, size.groups, 1, head))
        self.values[:, :, -1:] = self.v(normed).view(1, size.groups, 1, head)
        mixed = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        x = x + self.o(mixed.reshape(1, size.width))
        normed = self.between(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    @torch.no_grad()
    def forward(self, token: Tensor) -> Tensor:
        """The scores of the next token [1, vocabulary] after `token` [1]."""
        x = self.embed(token)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def models(size: Size, pattern: Pattern, device: str, seed: int = 0) -> tuple[Decoder, Decoder]:
    """The same pruned model in bf16, dense with zeros and with packed weights, those of 2:4 prepared."""
    made = []
    for sparse in (False, True):
        torch.manual_seed(seed)
        with torch.device(device):
            model = Decoder(size).to(torch.bfloat16)
        for layer in model.layers:
            linears = {name: one for name, one in layer.named_children() if isinstance(one, nn.Linear)}
            masks = {name: pk.select(torch.rand_like(one.weight), pattern.name) for name, one in linears.items()}
            for name, one in linears.items():
                one.weight.data.mul_(masks[name])
            if sparse:
                perp.swap_linears(layer, masks, layout=pattern.layout)
                perp.prepare(layer)
        made.append(model)
    return made[0], made[1]


def captured(model: Decoder) -> Callable[[], None]:
    """A step of the model as a CUDA graph; it has run before, so nothing is compiled or loaded while it is captured."""
    token = torch.zeros(1, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(token)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(model(token).argmax(-1))
    return graph.replay


def seconds(step: Callable[[], None]) -> float:
    """Of one step, over `STEPS` of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / STEPS


def row(size: Size, pattern: Pattern) -> Row:
    """The measured line; AssertionError where the two models do not agree, or where another backend served ours."""
    dense, sparse = models(size, pattern, "cuda")
    token = torch.ones(1, dtype=torch.int64, device="cuda")
    with dispatch.served() as served:
        ours = sparse(token).double()
    theirs = dense(token).double()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 0.05, f"the models differ by {error:.2g}"
    backends = {backend for op, backend in served if op == pattern.op}
    assert backends == {"cuda"}, f"the sparse layers were served by {', '.join(sorted(backends)) or 'nothing'}"
    steps = {"ours": captured(sparse), DENSE: captured(dense)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(seconds(step))
    speeds = {name: 1 / statistics.median(found) for name, found in times.items()}
    return Row(
        op=OP,
        kernel="cuda",
        shape=f"batch=1 context={size.context} width={size.width} layers={size.layers} pattern={pattern.name}",
        dtype="bfloat16",
        device=torch.cuda.get_device_name(),
        commit=machine.commit(),
        ours=speeds["ours"],
        peers={DENSE: speeds[DENSE]},
        unit="tokens/s",
        better="higher",
        target=None if pattern.target is None else pattern.target * speeds[DENSE],
        limit=None,
        peak_bytes=0,
        verified=True,
    )


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no GPU that torch sees: run this where there is one.", file=sys.stderr)
        return 2
    for pattern in PATTERNS:
        measured = row(Size(), pattern)
        path = results.FOLDER / f"{machine.slug(measured.device)}.json"
        results.write(path, results.merge(results.read(path), [measured]))
        print(f"{pattern.name}: {measured.ours:.1f} tokens/s, {measured.ratio(DENSE):.2f} times dense")
    return 0


if __name__ == "__main__":
    sys.exit(main())
