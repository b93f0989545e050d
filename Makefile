# Everything a person or CI runs. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint format types unit bench bench-lab bench-replication bench-placement clean

setup: $(READY)

# torch is asked for by itself first: its pinned CPU build is taken, never a CUDA download by another package's range.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[hf,dev]'
	mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $(VENV)/types/moeplan
	touch $(READY)

# The loop on the example that ships a real trace: measure this machine, solve, run, check.
demo: setup
	mkdir -p demo
	cd demo && ../$(BIN)/moeplan profile --model tiny-moe --output cluster.json
	cd demo && ../$(BIN)/moeplan solve --model tiny-moe --cluster cluster.json --trace ../examples/tiny_moe/trace.npz \
		--workload prefill:2048 --output plan.json
	cd demo && ../$(BIN)/moeplan run plan.json --output report.json --picture report.png --tolerance 1.0

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The repository's root is the package: the type checker sees it under its real name through a link.
types: setup
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p moeplan

unit: setup
	$(BIN)/python -m pytest

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench bench-lab: setup
	$(BIN)/python benchmarks/lab.py

bench-replication: setup
	$(BIN)/python benchmarks/replication.py

# TRACES: recorded routing to place on, by default the one that ships.
TRACES ?= examples/tiny_moe/trace.npz
bench-placement: setup
	$(BIN)/python benchmarks/placement.py $(TRACES)

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
