import numpy as np
import pytest
import torch

from perp_kernels import gram_

from .oracles import assert_no_worse, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens,K", [(1, 1), (7, 13), (2500, 33)])
def test_adds_to_what_is_there(dtype: torch.dtype, tokens: int, K: int) -> None:
    x = normal(tokens, K, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    before = normal(K, K, dtype=wide, seed=5)
    H = before.clone()
    assert gram_(H, x) is H
    exact = before.double() + x.double().t() @ x.double()
    plain = before + x.to(wide).t() @ x.to(wide)
    if dtype == torch.float64:
        torch.testing.assert_close(H, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_no_worse(H, plain, exact, factor=3.0)


def test_any_leading_shape_and_strides() -> None:
    x = normal(4, 3, 10).transpose(0, 1)[..., ::2]
    H = gram_(torch.zeros(5, 5), x)
    flat = x.reshape(-1, 5)
    torch.testing.assert_close(H, flat.t() @ flat)


def test_no_tokens_add_nothing() -> None:
    H = normal(4, 4)
    assert torch.equal(gram_(H.clone(), torch.empty(0, 4)), H)


def test_experts() -> None:
    x, offsets = normal(9, 4), torch.tensor([2, 2, 9])
    H = gram_(torch.zeros(3, 4, 4), x, offsets)
    torch.testing.assert_close(H, torch.stack([x[:2].t() @ x[:2], torch.zeros(4, 4), x[2:].t() @ x[2:]]))


def test_activations_that_require_grad() -> None:
    H = gram_(torch.zeros(4, 4), normal(9, 4).requires_grad_())
    assert not H.requires_grad


def test_numpy_memory_is_written_in_place() -> None:
    H, x = np.zeros((4, 4), dtype=np.float32), np.random.default_rng(0).standard_normal((9, 4), dtype=np.float32)
    gram_(H, x)
    np.testing.assert_allclose(H, x.T @ x, rtol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"not torch\.float32 for x in torch\.float64"):
        gram_(torch.zeros(4, 4), normal(2, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"not torch\.bfloat16"):
        gram_(torch.zeros(4, 4, dtype=torch.bfloat16), normal(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\[4, 4\]"):
        gram_(torch.zeros(5, 5), normal(2, 4))
    with pytest.raises(ValueError, match="contiguous"):
        gram_(torch.zeros(4, 8)[:, ::2], normal(2, 4))
    with pytest.raises(ValueError, match="Offsets"):
        gram_(torch.zeros(2, 4, 4), normal(2, 4))
