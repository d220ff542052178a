"""Where machine code comes from: shipped, stale, missing, refused; compiled, kept, and where it cannot be kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import perp_kernels as pk
from perp_kernels import cuda, dispatch
from perp_kernels.cuda import load

from ..oracles import normal, random_weight


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Folders of its own, and nothing remembered from another test."""
    monkeypatch.setattr(load, "CUBINS", tmp_path / "cubins")
    monkeypatch.setenv("PERP_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "_origins", {})
    for cached in (load._warn_once, load.module, load.usable):
        cached.cache_clear()
    yield
    for cached in (load._warn_once, load.module, load.usable):
        cached.cache_clear()


def ship(folder: Path, source: str, arch: str, fingerprint: str) -> bytes:
    folder.mkdir(exist_ok=True)
    cubin = b"ELF" + fingerprint.encode() + b"code"
    (folder / f"{source}.{arch}.cubin").write_bytes(cubin)
    return cubin


def test_architectures() -> None:
    assert [load.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["sm_80", "sm_89", "sm_90a", "sm_120"]
    assert [load.shipped_for(c) for c in ((8, 6), (9, 0), (10, 3))] == ["sm_80", "sm_90a", "sm_100"]


def test_a_cubin_of_these_sources_is_taken_and_a_stale_one_is_not() -> None:
    assert load.prebuilt("semi24_pack", (8, 6)) is None
    cubin = ship(load.CUBINS, "semi24_pack", "sm_80", load.fingerprint())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.prebuilt("semi24_pack", (8, 6)) == cubin
        assert load.prebuilt("semi24_pack", (12, 0)) is None
    ship(load.CUBINS, "semi24_pack", "sm_80", "0" * 64)
    with pytest.warns(RuntimeWarning, match="built from other sources") as told:
        assert [load.prebuilt("semi24_pack", (8, 0)) for _ in range(2)] == [None, None]
    assert len(told) == 1


def test_what_is_compiled_is_kept() -> None:
    built: list[tuple[str, str]] = []

    def build(source: str, arch: str) -> bytes:
        built.append((source, arch))
        return f"{source} for {arch}".encode()

    for _ in range(2):
        assert load.compiled("semi24_pack", "sm_86", build) == b"semi24_pack for sm_86"
    assert load.compiled("semi24_pack", "sm_89", build) == b"semi24_pack for sm_89"
    assert built == [("semi24_pack", "sm_86"), ("semi24_pack", "sm_89")]


def test_a_folder_that_cannot_be_written_costs_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PERP_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="set PERP_KERNEL_CACHE to a folder") as told:
        codes = [load.compiled("semi24_pack", arch, lambda *_: b"code") for arch in ("sm_80", "sm_80", "sm_86")]
    assert codes == [b"code"] * 3
    assert len(told) == 1


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, refused: set[bytes]) -> list[bytes]:
    """A GPU of capability 8.6 whose driver refuses some code; what it was given to load."""
    given: list[bytes] = []

    def driver(cubin: bytes, device: int) -> str:
        given.append(cubin)
        if cubin in refused:
            raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")
        return "module"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(load, "_load", driver)
    return given


def test_the_shipped_cubin_comes_before_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    given = on_a_gpu(monkeypatch, set())
    cubins = {
        kind: [ship(load.CUBINS, source, "sm_80", load.fingerprint()) for source in load.sources_for((8, 6), kind)]
        for kind in load.KINDS
    }
    monkeypatch.setattr(load, "compiled", lambda *_: pytest.fail("nothing has to be compiled"))
    assert load.usable(0, load.BITMAP)
    assert given == cubins[load.BITMAP], "a kind's kernels are loaded when they are needed"
    assert load.usable(0, load.SEMI24)
    assert given == [*cubins[load.BITMAP], *cubins[load.SEMI24]]
    assert load.origin(0) == "cubin for sm_80"


def test_kinds_from_different_places_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, set())
    for source in load.sources_for((8, 6), load.BITMAP):
        ship(load.CUBINS, source, "sm_80", load.fingerprint())
    monkeypatch.setattr(load, "compiled", lambda source, arch: b"fresh")
    assert load.origin(0).startswith("bitmap weights cubin for sm_80, 2:4 weights NVRTC for sm_86")


def test_code_that_the_driver_refuses_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cubin = ship(load.CUBINS, "semi24_pack", "sm_80", load.fingerprint())
    on_a_gpu(monkeypatch, {cubin})
    monkeypatch.setattr(load, "compiled", lambda source, arch: b"fresh")
    with pytest.warns(RuntimeWarning, match="The driver refuses") as told:
        assert load.usable(0, load.SEMI24)
    assert len(told) == 1
    assert load.origin(0).startswith("NVRTC for sm_86")


def test_a_gpu_without_kernels_leaves_the_op_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(source: str, arch: str) -> bytes:
        raise RuntimeError("no compiler")

    on_a_gpu(monkeypatch, set())
    monkeypatch.setattr(load, "compiled", compiled)
    with pytest.warns(RuntimeWarning, match="cannot be used: no CUDA kernels for sm_86: no compiler") as told:
        assert [load.usable(0, load.SEMI24) for _ in range(2)] == [False, False]
    assert len(told) == 1
    with pytest.warns(RuntimeWarning, match="for bitmap weights cannot be used"):
        assert load.origin(0).startswith("none: no CUDA kernels for sm_86")


def test_calls_that_the_kernels_do_not_take() -> None:
    _, _, w = random_weight((64, 64), "semi24", torch.bfloat16)
    x = normal(2, 64, dtype=torch.bfloat16)
    for tensor, shape in ((x, [64, 64]), (x.float(), [64, 64]), (x, [64, 96]), (x, [2, 64, 64])):
        assert not cuda.serves(tensor, shape)
    with dispatch.served() as served:
        pk.sparse_linear(x, w.prepare())
    assert ("tiled24_linear", "reference") in served
    if cuda.unavailable is not None:
        assert cuda.unavailable in pk.active()["tiled24_linear"][1]
        assert cuda.active() == f"none: {cuda.unavailable}"
        with pk.backend("cuda"), pytest.raises(ValueError, match="No cuda implementation serves"):
            pk.sparse_linear(x, w.prepare())


def test_nvrtc_compiles_every_source() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed, so NVRTC is not at hand")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"NVRTC does not load: {error}")
    for arch, capability in (("sm_80", (8, 0)), ("sm_90a", (9, 0))):
        for source in (source for kind in load.KINDS for source in load.sources_for(capability, kind)):
            assert load.compile_source(source, arch)[:4] == b"\x7fELF"
    with pytest.raises(RuntimeError, match="NVRTC cannot compile sm90_bf16_semi24_gemm for sm_80"):
        load.compile_source("sm90_bf16_semi24_gemm", "sm_80")
