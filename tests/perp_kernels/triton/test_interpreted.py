"""Runs the tests of kernels/ with TRITON_INTERPRET=1, a process per file: see kernels/conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

FILES = sorted(
    {*(Path(__file__).parent / "kernels").glob("test_*.py")} - {*Path(__file__).parent.glob("*/test_launched.py")}
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PERP_GPU": "0", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    print(done.stdout.splitlines()[-1])
