#!/bin/sh
# Builds the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize and runs their tests.
# Usage: csrc/sanitize.sh [pytest arguments]; PYTHON names the interpreter (default: .venv/bin/python).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export PERP_SANITIZE=address,undefined

"$PYTHON" setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib

# The interpreter is not instrumented, so the sanitizers' runtimes have to be there first. Leaks are not looked for: the
# interpreter and torch keep what they allocate at start-up. -P and `pythonpath` keep the plain build out of sys.path.
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
    "$PYTHON" -P -m pytest -q -n 2 -o pythonpath=build/sanitize/lib -p no:cacheprovider tests/perp_kernels/test_native*.py "$@"
