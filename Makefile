# make demo | test | lint | bench | sanitize | fuzz | teeth | emulate | triton-table | clean. Each works first in a fresh clone: it makes .venv.
#
# torch comes first and pinned: an unpinned torch would be another build (and on some indexes gigabytes of CUDA).
# PYOFFLINE_TORCH names another one, PYOFFLINE_VENV another environment.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= $(or $(PYOFFLINE_VENV),.venv)
TORCH ?= $(or $(PYOFFLINE_TORCH),torch==2.13.0)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.pyoffline-installed
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CXX_SOURCES := $(SOURCES) $(wildcard tests/cpp/*.c tests/cpp/*.h tests/cpp/*.cpp tests/cuda_host/*.h tests/cuda_host/*.cpp tests/emulator/*.c tests/emulator/*.cpp)
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test lint bench sanitize fuzz teeth emulate triton-table install clean

demo: install
	$(BIN)/pyoffline demo

bench: install
	$(BIN)/pyoffline bench

# tests/conftest.py leaves out what only a GPU can run, and counts it in the closing lines as not run.
# JOBS processes, each with its share of the cores; a file's tests stay together, in order.
test: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(BIN)/python -c "import os; print(max(1, os.cpu_count() // $(JOBS)))")} $(PYTEST) -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

sanitize: install
	bash tests/cpp/sanitize.sh build/sanitize $(abspath $(BIN)/python)
	bash tests/cuda_host/sanitize.sh build/sanitize-cuda

fuzz: install
	$(BIN)/python tests/fuzz_bindings.py --count 100000 --seed $${SEED:-0}

# Puts known bugs back, one by one, and looks whether the named tests fail (about 20 minutes).
teeth: install
	$(BIN)/python tests/teeth/run.py --json tests/teeth/result.json

# The GPU tests that speak of kernels alone, on an emulated GPU (tests/emulator; CAPABILITY=80 or 90): hours. `make test`
# runs a choice of them.
emulate: install
	PYOFFLINE_EMULATE=$${CAPABILITY:-90} PYTHONPATH=tests:. $(PYTEST) -q -p emulator.plugin -m gpu -n $(JOBS) -k "$${CHOICE:-not n13}" \
	  tests/test_gpu_numbers.py tests/test_gpu_distill.py

# Registers, shared memory and spills of every Triton kernel, compiled for five chips (minutes, no GPU).
triton-table: install
	mkdir -p build
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/triton_compile.py > build/triton_table.json
	mv build/triton_table.json tests/triton_table.json

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py tests/constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" numpy
	$(BIN)/python -m pip install -q --no-build-isolation -c tests/constraints.txt -e ".[train,dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info pyoffline/*.so $(INSTALLED) .pytest_cache .ruff_cache .hypothesis
