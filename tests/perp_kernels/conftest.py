from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_new_memory() -> Iterator[None]:
    """Uninitialised tensors start as NaN (integers: their largest value), so that an element left unwritten shows."""
    # Only warned of: torch calls some functions that are exact, sums of integers among them, uncertain on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
