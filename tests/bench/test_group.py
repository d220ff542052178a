"""A control group with too little memory ends the process; where none can be made, it says why."""

import subprocess
import sys

import pytest

from bench.streaming import group

LIMIT = 60_000_000


@pytest.mark.parametrize("size, ends", [(20_000_000, True), (120_000_000, False)])
def test_a_process_may_take_so_much_and_no_more(size, ends):
    try:
        with group.limited(LIMIT) as before:
            taking = [*before, sys.executable, "-c", f"b'x' * {size}"]
            done = subprocess.run(taking, capture_output=True, timeout=60)
    except group.Unavailable as error:
        pytest.skip(str(error))
    assert (done.returncode == 0) == ends
