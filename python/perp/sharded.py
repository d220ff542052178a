"""Blocks whose frozen weights are shared out among the ranks while the model is trained: FSDP2.

It is torch's own `fully_shard`; accelerate would call the same, and bring an optimiser and a launcher that we have.
Each rank holds an equal part of the rows of every frozen tensor and gathers the whole of a block for as long as the
block computes. What trains is a hundredth of the model or less and stays whole on every rank, so that the optimiser
needs to know nothing of this; so do flat tensors (the values of rows with unequal counts), which have no rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, share_comm_ctx

from perp import distributed
from perp.blocks import find_blocks


@contextmanager
def sharded(model: Any, wanted: bool = True) -> Iterator[None]:
    """For the duration, the frozen weights of the blocks of `model` are sharded over the ranks, if that is `wanted`.

    The blocks that run meanwhile are copies, with the parameters that train in common; those of `model` are there
    again at the end, with their weights. After an error they are without: bringing them back takes every rank, and some
    may be gone. One rank has the whole anyway.
    """
    _, blocks = find_blocks(model)
    own = list(blocks) if wanted and distributed.size() > 1 else []
    frozen = [_shardable(block) for block in own]
    mesh = init_device_mesh(model.device.type, (distributed.size(),)) if own else None
    twins = [_shard(block, weights, mesh) for block, weights in zip(own, frozen, strict=True)]
    # With streams in common a block is gathered while the one before it computes.
    share_comm_ctx(twins)
    for index, twin in enumerate(twins):
        blocks[index] = twin
    yield
    for index, (block, twin) in enumerate(zip(own, twins, strict=True)):
        _restore(twin, frozen[index])
        blocks[index] = block


def _shardable(block: nn.Module) -> dict[str, nn.Parameter]:
    return {name: own for name, own in block.named_parameters() if own.ndim > 1 and not own.requires_grad}


def _shard(block: nn.Module, frozen: dict[str, nn.Parameter], mesh: DeviceMesh | None) -> Any:
    """A copy of the block with `frozen` sharded, whose memory in the block itself is released."""
    in_common = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    twin = copy.deepcopy(block, in_common)
    shared_out = {id(parameter) for parameter in frozen.values()}
    fully_shard(twin, mesh=mesh, ignored_params={own for own in block.parameters() if id(own) not in shared_out})
    for parameter in frozen.values():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return twin


def _restore(twin: Any, frozen: dict[str, nn.Parameter]) -> None:
    twin.unshard()
    whole = dict(twin.named_parameters())
    for name, parameter in frozen.items():
        parameter.data = whole[name].detach().clone()
    twin.reshard()
