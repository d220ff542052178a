"""The index functions that the kernels are made of, through the CPU extension, against the manual's operands."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from perp_kernels import cpu
from perp_kernels.cpu import native

from ..native import needs_native
from ..oracles import random_weight
from . import manual

pytestmark = needs_native

index = native.extension().cuda_index if cpu.available else None


def ldmatrix(memory: manual.Bytes, row_offsets: list[int]) -> list[list[int]]:
    """[lane][register * 2 + half]: what ldmatrix.x4 gives each lane; lanes 8 i .. 8 i + 7 name the rows of matrix i,
    and a lane holds columns 2 (lane % 4), + 1 of row lane / 4 of each."""
    found = []
    for lane in range(32):
        row = [memory[o : o + 16].view(np.uint16) for o in (row_offsets[8 * i + lane // 4] for i in range(4))]
        found.append([int(row[i][2 * (lane % 4) + half]) for i in range(4) for half in range(2)])
    return found


def weight_tile() -> tuple[np.ndarray, np.ndarray, manual.Bytes, np.ndarray]:
    """kept [64, 32], nibbles [64, 16] of a canonical weight; its tile's bytes and index words."""
    _, _, w = random_weight((64, 64), "semi24", torch.bfloat16)
    w.values.view(torch.int16)[:] = torch.arange(2048, dtype=torch.int16).view(64, 32)
    kept = w.values.view(torch.int16).numpy().view(np.uint16)
    nibbles = np.stack([w.index.numpy() & 15, w.index.numpy() >> 4], axis=-1).reshape(64, 16)
    prepared = w.prepare()
    return (
        kept,
        nibbles,
        prepared.values.view(torch.uint8).numpy().ravel(),
        prepared.index.numpy().view(np.uint32).ravel(),
    )


def test_values_and_index_lie_where_the_header_says() -> None:
    kept, nibbles, memory, words = weight_tile()
    for row, chunk in itertools.product(range(64), range(4)):
        at = index.value_chunk(row, chunk)
        assert (memory[at : at + 16].view(np.uint16) == kept[row, 8 * chunk : 8 * chunk + 8]).all()
        assert at == manual.swizzled(row * 64 + chunk * 16, 64)
    for row, t in itertools.product(range(64), range(4)):
        half = int(words[index.index_word(row, t)]) >> 16 * index.index_half(row) & 0xFFFF
        assert [half >> 4 * n & 15 for n in range(4)] == nibbles[row, 4 * t : 4 * t + 4].tolist()


@pytest.mark.parametrize("strip,step", list(itertools.product(range(4), range(2))))
def test_registers_of_mma_sp_hold_its_a(strip: int, step: int) -> None:
    kept, nibbles, memory, words = weight_tile()
    registers = ldmatrix(memory, [index.a_row_offset(lane, strip, step) for lane in range(32)])
    own = [int(word) for word in words[32 * strip : 32 * strip + 32]]
    for lane, i in itertools.product(range(32), range(8)):
        row, columns = manual.mma_a(lane, i)
        four = (32 * step + columns.start) // 4
        assert registers[lane][i] == kept[16 * strip + row, 2 * four + i % 2]
        assert manual.metadata(own, step, row, columns.start) == nibbles[16 * strip + row, four]


def tokens_block(tokens: int) -> tuple[np.ndarray, manual.Bytes]:
    """x [tokens, 64] and the bytes of its block, each token's chunks where the header puts them."""
    x = np.arange(tokens * 64, dtype=np.uint16).reshape(tokens, 64)
    memory = np.zeros(tokens * 128, dtype=np.uint8)
    for token, chunk in itertools.product(range(tokens), range(8)):
        at = index.token_chunk(token, chunk)
        memory[at : at + 16] = x[token, 8 * chunk : 8 * chunk + 8].view(np.uint8)
    return x, memory


@pytest.mark.parametrize("eight,step", list(itertools.product(range(3), range(2))))
def test_registers_of_mma_sp_hold_its_b(eight: int, step: int) -> None:
    x, memory = tokens_block(24)
    registers = ldmatrix(memory, [index.b_row_offset(lane, eight, step) for lane in range(32)])
    for lane, i in itertools.product(range(32), range(8)):
        row, column = manual.mma_b(lane, i)
        assert registers[lane][i] == x[8 * eight + column, 32 * step + row]


@pytest.mark.parametrize("step", range(2))
def test_descriptors_of_wgmma_find_its_operands(step: int) -> None:
    kept, nibbles, memory, words = weight_tile()
    base = 3 * 1024  # the tile anywhere a pattern may begin
    around = np.concatenate([np.full(base, 0xEE, dtype=np.uint8), memory])
    found = manual.wgmma_a(around, index.weight_descriptor(base, step), words.reshape(4, 32), step)
    expected = manual.dense(kept[:, 16 * step : 16 * step + 16], nibbles[:, 8 * step : 8 * step + 8].astype(np.int64))
    assert (found == expected).all()
    x, block = tokens_block(16)
    around = np.concatenate([np.full(base, 0xEE, dtype=np.uint8), block])
    operand = manual.operand(around, index.token_descriptor(base, step), 16, 32)
    assert (operand == x[:, 32 * step : 32 * step + 32]).all()


def test_eight_rows_of_ldmatrix_lie_in_different_banks() -> None:
    for matrix, step, strip in itertools.product(range(4), range(2), range(4)):
        for offset in (index.a_row_offset, index.b_row_offset):
            rows = [offset(8 * matrix + row, strip, step) for row in range(8)]
            assert len({at // 16 % 8 for at in rows}) == 8


def test_accumulators() -> None:
    for lane, element in itertools.product(range(32), range(4)):
        place = index.accumulator_row(lane, element), index.accumulator_token(lane, element)
        assert place == manual.mma_c(lane, element)


@pytest.mark.parametrize("rows,tokens", [(1, 1), (8, 3), (9, 1), (7, 20), (20, 7), (112, 5)])
def test_every_block_has_a_place_of_its_own_and_neighbours_share(rows: int, tokens: int) -> None:
    places = [index.place(block, rows, tokens) for block in range(rows * tokens)]
    assert set(places) == set(itertools.product(range(rows), range(tokens)))
    order = [(row // 8, token) for row, token in places]
    assert order == sorted(order), "eight blocks of rows take all tokens before the next eight begin"


@pytest.mark.parametrize("tiles,parts", [(1, 4), (3, 4), (64, 4), (65, 8), (7, 1)])
def test_parts_cover_the_inputs_evenly(tiles: int, parts: int) -> None:
    edges = [index.first_tile(tiles, part, parts) for part in range(parts + 1)]
    assert (edges[0], edges[-1]) == (0, tiles)
    sizes = [after - before for before, after in itertools.pairwise(edges)]
    assert max(sizes) - min(sizes) <= 1


def test_tiles_are_numbered_past_32_bits() -> None:
    assert index.tile_number(1 << 20, 5, 1 << 14) == (1 << 34) + 5
