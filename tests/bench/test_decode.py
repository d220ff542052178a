"""The decoder of bench.decode on the CPU: the two models are one."""

from __future__ import annotations

import pytest
import torch

from bench import decode
from perp.linear import SparseLinear
from perp_kernels import TILED24

SIZE = decode.Size(width=128, inner=192, layers=2, heads=4, groups=2, vocabulary=50, context=8)


@pytest.mark.parametrize("pattern,layout", list(zip(decode.PATTERNS, [TILED24, "bitmap"], strict=True)))
def test_both_models_compute_the_same(pattern: decode.Pattern, layout: str) -> None:
    dense, sparse = decode.models(SIZE, pattern, "cpu")
    layouts = [layer.layout for layer in sparse.modules() if isinstance(layer, SparseLinear)]
    assert layouts == [layout] * 14
    token = torch.ones(1, dtype=torch.int64)
    ours, theirs = sparse(token).double(), dense(token).double()
    assert ours.shape == (1, 50)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
    other = decode.models(SIZE, pattern, "cpu", seed=1)[0]
    assert (other(token).double() - theirs).norm() > 0.5 * theirs.norm()


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert decode.main() == 2
        assert "there is no GPU" in capsys.readouterr().err
