"""What only a GPU can show: offsets past 2^31, streams, graphs, and every device of the machine."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perp_kernels as pk
from tests.perp_kernels.oracles import DEVICE, normal, random_weight

BF16 = torch.bfloat16
# More than 2^32 weights and 2^31 kept ones.
N, K = 70_000, 65_536
LARGE_GPU = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 60 << 30


def huge_test(test: Callable[..., None]) -> Callable[..., None]:
    """One after the other, where tests run side by side, and on a GPU that holds them."""
    skips = pytest.mark.skipif(not LARGE_GPU, reason="needs a GPU with 60 GB")
    return skips(pytest.mark.xdist_group("huge")(test))


@pytest.fixture(scope="module")
def huge() -> pk.SparseWeight:
    """Each byte of the index keeps four columns, so that rows are equal and nothing has to be counted."""
    fours = torch.tensor([byte for byte in range(256) if byte.bit_count() == 4], dtype=torch.uint8, device=DEVICE)
    index = fours[torch.randint(len(fours), (N, K // 8), device=DEVICE)]
    return pk.SparseWeight(torch.randn(N, K // 2, dtype=BF16, device=DEVICE) / K**0.5, index, None, (N, K), "bitmap")


def last_rows(w: pk.SparseWeight, count: int) -> Tensor:
    """Those of the dense weight."""
    with pk.backend("reference"):
        part = pk.SparseWeight(w.values[-count:], w.index[-count:], None, (count, w.shape[1]), w.layout)
        return part.unpack()


@huge_test
def test_unpack_past_two_to_the_31(huge: pk.SparseWeight) -> None:
    with pk.backend("triton"):
        dense = huge.unpack()
    assert torch.equal(dense[-64:], last_rows(huge, 64))
    torch.testing.assert_close(dense.sum(dtype=torch.float32), huge.values.sum(dtype=torch.float32), rtol=1e-3, atol=1)


@huge_test
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_few_tokens_past_two_to_the_31(huge: pk.SparseWeight, backend: str, tokens: int) -> None:
    if backend == "cuda" and pk.cuda.unavailable is not None:
        pytest.skip(pk.cuda.unavailable)
    x = normal(tokens, K, dtype=BF16)
    with pk.backend(backend):
        y = pk.sparse_linear(x, huge)
    exact = F.linear(x.double(), last_rows(huge, 64).double())
    torch.testing.assert_close(y[:, -64:].double(), exact, rtol=2e-2, atol=2e-2)


@huge_test
def test_adapter_gradients_past_two_to_the_31(huge: pk.SparseWeight) -> None:
    x, dy = normal(64, K, dtype=BF16), normal(64, N, dtype=BF16, seed=3)
    A, B = normal(16, K, dtype=BF16, seed=4) / K**0.5, normal(N, 16, dtype=BF16, seed=5).requires_grad_()
    with pk.backend("triton"):
        (dB,) = torch.autograd.grad(pk.masked_lora_linear(x, huge, A, B, 2.0), B, dy)
    G = dy[:, -64:].double().t() @ x.double() * (last_rows(huge, 64) != 0)
    exact = 2 * G @ A.double().t()
    torch.testing.assert_close(dB[-64:].double(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


@huge_test
def test_gram_of_more_than_two_to_the_31_numbers() -> None:
    # Whole numbers whose sums float32 holds exactly.
    x = torch.randint(-1, 2, (600_000, 4096), dtype=torch.int8, device=DEVICE).to(BF16)
    with pk.backend("triton"):
        H = pk.gram_(torch.zeros(4096, 4096, device=DEVICE), x)
    exact = sum(part.double().t() @ part[:, -64:].double() for part in x.split(50_000))
    assert torch.equal(H[:, -64:].double(), exact)
    assert torch.equal(H, H.t())


def test_launches_follow_the_current_stream() -> None:
    weight, _, w = random_weight((300, 512), "bitmap", BF16)
    x, stream = torch.zeros(8, 512, dtype=BF16, device=DEVICE), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), pk.backend("triton"):
        torch.cuda._sleep(10_000_000)
        x.fill_(1)
        y = pk.sparse_linear(x, w)
    stream.synchronize()
    torch.testing.assert_close(y, F.linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_sparse_linear_is_captured_in_a_graph(tokens: int) -> None:
    weight, _, w = random_weight((300, 512), "semi24", BF16)
    x = normal(tokens, 512, dtype=BF16)
    with pk.backend("triton"):
        pk.sparse_linear(x, w)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = pk.sparse_linear(x, w)
    x.copy_(normal(tokens, 512, dtype=BF16, seed=7))
    graph.replay()
    torch.testing.assert_close(y, F.linear(x, weight), rtol=2e-2, atol=2e-2)


def test_every_device_of_the_machine() -> None:
    weight, _, w = random_weight((300, 512), "bitmap", BF16)
    x = normal(100, 512, dtype=BF16)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        with pk.backend("triton"):
            y = pk.sparse_linear(x.to(device), w.to(device))
            assert pk.gram_(torch.zeros(512, 512, device=device), x.to(device)).isfinite().all()
        assert y.device == device
        torch.testing.assert_close(y, F.linear(x, weight).to(device), rtol=2e-2, atol=2e-2)
