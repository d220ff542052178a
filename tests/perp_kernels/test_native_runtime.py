"""How the native extension sits in the process: its threads, its choice of path, and its absence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perp_kernels import cpu
from perp_kernels.cpu import native
from perp_kernels.cpu.pack import pack

from .native import PATHS, force, needs_native


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from force(request.param)


def run(code: str) -> str:
    """stdout of `code` in a fresh interpreter that finds perp_kernels where this one did."""
    root = str(Path(cpu.__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    """A second libgomp would keep a second pool, and both would spin on the same cores."""
    maps = "open('/proc/self/maps').read().split()"
    runtimes = f"print(*{{p for p in {maps} if 'libgomp' in p or 'libomp' in p or 'libiomp' in p}}, sep='\\n')"
    alone = run(f"import torch; torch.ones(9).sum()\n{runtimes}").split()
    both = run(f"from perp_kernels.cpu import native; native.extension().max_threads()\n{runtimes}").split()
    assert len(both) == 1
    assert both == alone


@needs_native
def test_the_build_under_test_is_the_one_meant() -> None:
    assert native.extension().sanitizers == os.environ.get("PERP_SANITIZE", "")


@needs_native
def test_threads_follow_torch() -> None:
    code = (
        "import torch\nfrom perp_kernels.cpu import native\n"
        "torch.set_num_threads({n})\nprint(native.extension().max_threads())"
    )
    assert run(code.format(n=1)) == "1"
    assert run(code.format(n=3)) == "3"


@needs_native
def test_paths_are_forced_by_name() -> None:
    needed = {
        "portable": set(),
        "avx2": {"avx2", "fma", "f16c", "bmi2"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2", "avx512_bf16"},
    }
    served = [path for path in PATHS if needed[path] <= set(cpu.cpu_features())]
    for path in served:
        cpu.set_path(path)
        assert cpu.active_path() == path
    cpu.set_path("auto")
    assert cpu.active_path() == served[-1]
    with pytest.raises(ValueError, match='must be "auto", "avx512", "avx2" or "portable", not "sse"'):
        cpu.set_path("sse")


def test_without_the_extension_the_module_says_why() -> None:
    out = run(
        "sys.modules['perp_kernels._C'] = None\n"
        "from perp_kernels import cpu\n"
        "print(cpu.available, '|', cpu.why)\n"
        "try:\n    cpu.cpu_features()\nexcept RuntimeError as error:\n    print(error)"
    )
    assert out.splitlines()[0].startswith("False | the native extension was not built")
    assert "no native CPU kernels" in out.splitlines()[1]


@needs_native
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randn(301, 700)
    bits = torch.randint(0, 256, (301, 88), dtype=torch.uint8)
    bits[:, -1] &= 0x0F
    threads = torch.get_num_threads()
    results = []
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(pack(weight, bits, "bitmap")[0])
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@needs_native
@pytest.mark.parametrize("count", [0, 1, 7, 8, 31, 32, 33, 300_001])
def test_read_words_reads_every_word(path: str, count: int) -> None:
    buffer = torch.zeros(count, dtype=torch.int64)
    expected = 0
    for place in {0, count // 2, count - 1} if count else ():
        bit = place % 64
        buffer[place] |= 1 << bit if bit < 63 else -(1 << 63)
        expected |= 1 << bit
    assert native.read_words(buffer) == expected
    with pytest.raises(ValueError, match="contiguous"):
        native.read_words(torch.zeros(8, dtype=torch.int64)[::2])
