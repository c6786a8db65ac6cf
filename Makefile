# `make demo` and `make test` are all a newcomer needs: both make the environment first.
# PYTHON=python3.12 picks an interpreter; otherwise the first of 3.11 to 3.13 is taken.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Ray: no token file in the user's home, no warning about accelerators on a machine without one.
export RAY_AUTH_MODE ?= disabled
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

.PHONY: help setup demo test lint types check bench format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    answer HumanEval's prompts, from Parquet on S3 to Parquet on S3, with a real model on the CPU"
	@echo "make test    the tests"
	@echo "make check   ruff, mypy and the tests: what CI runs"
	@echo "make bench   the correctness gate, then the benchmarks: of the GPU if there is one (MODEL=, WORKLOAD=), else of the CPU"
	@echo "make format  rewrite the code in ruff's format"
	@echo "make setup   only the environment, in $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt .ci/install
	@.ci/install $(VENV)
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m examples.demo

test: $(STAMP)
	@.ci/test

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(STAMP)
	@$(BIN)/mypy

check: lint types test

bench: $(STAMP)
	@MODEL="$(MODEL)" WORKLOAD="$(WORKLOAD)" $(BIN)/python -m tests.benchmarks.bench $(BENCH_ARGS)

format: $(STAMP)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
