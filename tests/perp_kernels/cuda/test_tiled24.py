"""The order tiled24 in plain torch: what the manual's operands make of it, and what the package does with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import perp_kernels as pk

from ..oracles import assert_no_worse, normal, random_weight
from . import manual

DTYPES = [torch.bfloat16, torch.float16]


def tiled(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, pk.SparseWeight]:
    weight, _, w = random_weight(shape, "semi24", dtype, seed)
    return weight, w.prepare()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("shape", [(64, 64), (130, 192), (1, 128)])
def test_a_product_from_the_tiles_by_the_manual_is_the_reference(shape: tuple[int, int]) -> None:
    (N, K), (weight, w) = shape, tiled(shape)
    P = -(-N // 64) * 64
    values = w.values.view(torch.uint8).numpy().reshape(P // 64, K // 64, 4096)
    words = w.index.numpy().view(np.uint32).reshape(P // 64, K // 64, 4, 32)
    found = np.zeros((P, K), dtype=np.uint16)
    for block in range(P // 64):
        for tile in range(K // 64):
            for step in range(2):
                # 64-byte swizzle, eight rows 512 bytes apart, 16 kept values (32 bytes) a step.
                descriptor = 32 * step >> 4 | (512 >> 4) << 32 | 2 << 62
                strip = manual.wgmma_a(values[block, tile], descriptor, words[block, tile], step)
                found[64 * block : 64 * block + 64, 64 * tile + 32 * step : 64 * tile + 32 * step + 32] = strip
    restored = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits(restored[:N]), bits(weight))
    assert not restored[N:].any()
    x = normal(3, K, dtype=torch.bfloat16)
    torch.testing.assert_close(x.double() @ restored[:N].double().T, x.double() @ weight.double().T, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,K", [(64, 64), (1, 64), (65, 320), (192, 128)])
def test_the_canonical_form_comes_back_to_the_bit(N: int, K: int, dtype: torch.dtype) -> None:
    _, mask, w = random_weight((N, K), "semi24", dtype)
    w.values.view(-1)[:4] = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf")])
    prepared = w.prepare()
    back = prepared.canonical()
    assert back.layout == "semi24"
    assert torch.equal(bits(back.values), bits(w.values))
    assert torch.equal(back.index, w.index)
    assert torch.equal(prepared.mask(), mask)
    assert torch.equal(bits(prepared.unpack()), bits(w.unpack()))
    assert (prepared.nnz, prepared.shape) == (w.nnz, w.shape)
    assert prepared.nbytes == -(-N // 64) * 64 * K * 9 // 8
    pk.SparseWeight.from_components(prepared.components(), (N, K), "tiled24")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_at_once_is_packing_and_preparing(dtype: torch.dtype) -> None:
    weight, mask, w = random_weight((70, 128), "semi24", dtype)
    at_once, prepared = pk.pack(weight, mask, "tiled24"), w.prepare()
    assert torch.equal(bits(at_once.values), bits(prepared.values))
    assert torch.equal(at_once.index, prepared.index)
    assert prepared.prepare() is prepared


@pytest.mark.parametrize(
    "shape,layout,dtype,words",
    [
        ((8, 96), "semi24", torch.bfloat16, r"K a multiple of 64, not \[8, 96\]"),
        ((2, 8, 64), "semi24", torch.bfloat16, r"a weight \[N, K\]"),
        ((8, 64), "bitmap", torch.bfloat16, "Only a weight of layout semi24"),
        ((8, 64), "semi24", torch.float32, "bfloat16 or float16 values, not torch.float32"),
    ],
)
def test_weights_that_have_no_such_order(shape: tuple[int, ...], layout: str, dtype: torch.dtype, words: str) -> None:
    _, _, w = random_weight(shape, layout, dtype)
    with pytest.raises((ValueError, TypeError), match=words):
        w.prepare()


def test_a_mask_that_is_not_2_to_4_and_other_values_are_refused() -> None:
    weight, mask, w = random_weight((64, 64), "semi24", torch.bfloat16)
    mask[5, 8:12] = True
    with pytest.raises(ValueError, match="output row 5 keeps 4 of inputs 8 to 11"):
        pk.pack(weight, mask, "tiled24")
    with pytest.raises(TypeError, match=r"not torch\.float32"):
        w.prepare().to(dtype=torch.float32)
    with pytest.raises(ValueError, match="not those of"):
        w.prepare().assign_(weight[:, :60])
    prepared = w.prepare()
    prepared.values.requires_grad_()
    with pytest.raises(ValueError, match="get no gradient"):
        pk.sparse_linear(normal(2, 64, dtype=torch.bfloat16), prepared)


@pytest.mark.parametrize("damage", ["pair", "padding", "shape"])
def test_components_that_are_no_tiled_weight(damage: str) -> None:
    parts = tiled((60, 64))[1].components()
    parts = {name: part.clone() for name, part in parts.items()}
    if damage == "pair":
        parts["index"][0, 0] = 0x55
    elif damage == "padding":
        parts["index"][-1, -1] = 0x88  # of row 63, past the last
    else:
        parts["values"] = parts["values"][:60]
    with pytest.raises(ValueError, match="Not a packed weight"):
        pk.SparseWeight.from_components(parts, (60, 64), "tiled24")


def call_sparse(x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    return pk.sparse_linear(x, w, bias)


def call_masked(x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    return pk.masked_lora_linear(x, w, A, B, 0.5, bias)


def call_scaled(x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    return pk.scale_lora_linear(x, w, A, B, bias)


@pytest.mark.parametrize("call", [call_sparse, call_masked, call_scaled])
def test_ops_and_their_gradients_are_those_of_the_canonical_form(call: Callable[..., Tensor]) -> None:
    _, _, w = random_weight((70, 128), "semi24", torch.bfloat16)
    results = []
    for weight in (w, w.prepare()):
        x, bias = normal(2, 3, 128, dtype=torch.bfloat16).requires_grad_(), normal(70).requires_grad_()
        A, B = normal(4, 128).requires_grad_(), normal(70, 4, seed=5).requires_grad_()
        y = call(x, weight, A, B, bias)
        y.backward(normal(*y.shape, dtype=torch.bfloat16, seed=9))
        results.append([y, *(leaf.grad for leaf in (x, A, B, bias))])
        with torch.no_grad():
            assert torch.equal(call(x, weight, A, B, bias), y)
    for got, expected in zip(*results, strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


def test_merges_and_assignments_leave_the_order_and_the_mask() -> None:
    _, mask, w = random_weight((70, 128), "semi24", torch.bfloat16)
    prepared, index = w.prepare(), w.prepare().index
    A, B, other = normal(4, 128), normal(70, 4, seed=5), normal(70, 128, dtype=torch.bfloat16)
    for change in (
        lambda one: one.add_lowrank_(A, B, 0.5),
        lambda one: one.mul_lowrank_(A, B),
        lambda one: one.assign_(other),
    ):
        change(w), change(prepared)
        assert torch.equal(bits(prepared.unpack()), bits(w.unpack()))
        assert torch.equal(prepared.index, index)
    assert torch.equal(w.unpack(), torch.where(mask, other, 0))


@pytest.mark.parametrize("layout", ["dense", "bitmap", "semi24"])
def test_assignment_in_the_other_layouts(layout: str) -> None:
    _, mask, w = random_weight((6, 12), layout)
    other = normal(6, 12, seed=7)
    kept = other.clone()
    assert torch.equal(w.assign_(other).unpack(), torch.where(mask, other, 0.0))
    assert torch.equal(other, kept)


def test_a_compiled_layer_over_a_prepared_weight() -> None:
    weight, w = tiled((64, 128))
    compiled = torch.compile(lambda x: pk.sparse_linear(x, w), fullgraph=True, backend="aot_eager")
    x = normal(3, 128, dtype=torch.bfloat16)
    plain = x @ weight.T
    assert_no_worse(compiled(x), plain, x.double() @ weight.double().T)
