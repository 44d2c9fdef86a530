# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `make train ARGS="--arch small --dataset cifar10"` passes options of your own
ARGS ?= --arch big --dataset digits --epochs 8

.PHONY: setup train test test-long bench bench-peers lint format clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml tools/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tools/constraints.txt --editable ".[dali,dev,triton]"
	touch $@

train: setup
	$(BIN)/python -m fastcifar.train $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 -m "not cuda"

test-long: setup
	FASTCIFAR_LONG_TESTS=1 $(BIN)/python -m pytest -n 2 -m "not cuda" --timeout 3600

bench: bench-peers
	$(BIN)/python -m benchmarks.loader_race
	$(BIN)/python -m benchmarks.ceiling
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.first_batch
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.safety
	tools/bench_table

# the environments of the loaders that ours races with: several GB in .bench, once
bench-peers: setup
	$(BIN)/python -m benchmarks.peers

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
