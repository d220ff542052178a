"""These tests run the kernels in Triton's interpreter, which has to be chosen before Triton is imported: they are
collected only in the processes that ../test_interpreted.py starts."""

import os

if os.environ.get("TRITON_INTERPRET", "0") != "1":
    collect_ignore_glob = ["test_*.py"]
