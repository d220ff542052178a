import pytest
import torch

import perp_kernels as pk
from perp_kernels import cpu, dispatch


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op of three backends: the fast one serves only float32, and this machine has no triton."""
    monkeypatch.setattr(dispatch, "_implementations", {})
    dispatch.register("double", "reference", lambda x: ("reference", 2 * x))
    dispatch.register("double", "cpu", lambda x: ("cpu", 2 * x), lambda x: x.dtype == torch.float32)
    dispatch.register("double", "triton", lambda x: ("triton", 2 * x), unavailable="no GPU")
    return "double"


def serving(op: str, x: torch.Tensor) -> str:
    return dispatch.select(op, x)(x)[0]


def test_the_fastest_that_supports_the_call_serves(op: str) -> None:
    assert serving(op, torch.ones(1)) == "cpu"
    assert serving(op, torch.ones(1, dtype=torch.float64)) == "reference"


def test_override_nests_and_ends(op: str) -> None:
    with pk.backend("reference"):
        assert serving(op, torch.ones(1)) == "reference"
        with pk.backend("cpu"):
            assert serving(op, torch.ones(1)) == "cpu"
        assert serving(op, torch.ones(1)) == "reference"
    assert serving(op, torch.ones(1)) == "cpu"


def test_override_that_cannot_serve_is_an_error(op: str) -> None:
    with pk.backend("cpu"), pytest.raises(ValueError, match="No cpu implementation serves this call of double"):
        serving(op, torch.ones(1, dtype=torch.float64))
    with pk.backend("triton"), pytest.raises(ValueError, match="No triton implementation"):
        serving(op, torch.ones(1))
    with pytest.raises(ValueError, match="no backend 'gpu'"), pk.backend("gpu"):
        pass


def test_what_served_is_recorded_while_the_block_is_open(op: str) -> None:
    with dispatch.served() as outer:
        serving(op, torch.ones(1))
        with dispatch.served() as inner:
            serving(op, torch.ones(1, dtype=torch.float64))
    serving(op, torch.ones(1))
    assert inner == {("double", "reference")}
    assert outer == {("double", "cpu"), ("double", "reference")}


def test_report_names_what_was_passed_over(op: str) -> None:
    assert pk.active() == {"double": ("cpu", "triton: no GPU")}


def test_report_of_the_package() -> None:
    report = pk.active()
    assert report["unpack_mask"] == ("reference", "")
    assert report["pack"] == (("cpu", "") if cpu.available else ("reference", f"cpu: {cpu.why}"))
