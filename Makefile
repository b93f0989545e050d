# Everything a person or CI runs. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEVELOP := $(VENV)/.develop

.PHONY: setup develop demo test test-sanitize lint format types unit docs bench bench-lab bench-systems bench-annealing bench-by-batch bench-coherent bench-crossover bench-duplicates bench-foresight bench-kills bench-layers bench-offload bench-selection bench-settings bench-scaled-tables bench-silicon bench-timelines bench-replication bench-search bench-placement bench-kernels bench-engines clean bench-advise bench-calibrate bench-serving-search bench-service page-pictures bench-loop bench-watch

# What a demo needs; `make test` and the benchmarks add the rest.
setup: $(READY)

# All extras: the service, Ray, measured tables of GPUs, the tests' and documents' tools.
develop: $(DEVELOP)

# torch is asked for by itself first: its pinned CPU build is taken, never a CUDA download by another package's range.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[hf]'
	$(BIN)/python -m moeplan.runtime.kernels.cpp.build
	$(BIN)/python -m moeplan.solvers.compiled
	touch $(READY)

$(DEVELOP): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[hf,service,ray,silicon,dev,docs]'
	mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $(VENV)/types/moeplan
	touch $(DEVELOP)

# The loop on the example that ships a real trace: measure this machine, solve, run, check.
demo: setup
	mkdir -p demo
	cd demo && ../$(BIN)/moeplan profile --model tiny-moe --output cluster.json
	cd demo && ../$(BIN)/moeplan solve --model tiny-moe --cluster cluster.json --trace ../examples/tiny_moe/trace.npz \
		--workload prefill:2048 --output plan.json
	cd demo && ../$(BIN)/moeplan run plan.json --output report.json --picture report.png --tolerance 1.0

test: lint types docs unit

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The repository's root is the package: the type checker sees it under its real name through a link.
types: develop
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p moeplan

# The site, in build/site, for any web server or `python -m http.server -d build/site`; a lost page or a broken link ends it.
docs: develop
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Two files at a time, in the order of tests/conftest.py, so that what a file sets up is set up once; alone what judges a time.
unit: develop
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/python -m pytest -m alone

# The kernels' tests on a build that checks addresses and undefined behaviour, which must be loaded before Python's own.
test-sanitize: develop
	MOEPLAN_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		$(BIN)/python -m pytest -p no:cacheprovider tests/test_kernels_cpp.py tests/test_kernels.py tests/test_kernels_dense.py

format: develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench bench-lab: develop
	$(BIN)/python benchmarks/lab.py

bench-systems: develop
	$(BIN)/python benchmarks/systems.py

bench-scaled-tables: develop
	$(BIN)/python -m moeplan.benchmarks.scaled_tables

bench-silicon: develop
	$(BIN)/python -m moeplan.benchmarks.silicon --out benchmarks/results

# Does EPLB pay: the predicted sign beside measured pairs; TRACES: also what is said and found on recordings.
bench-advise: develop
	$(BIN)/python -m moeplan.benchmarks.advise
	$(if $(TRACES),$(BIN)/python -m moeplan.benchmarks.advise_traces $(TRACES))

# ROWS: a CSV of measured and predicted times, with the columns that benchmarks/calibrate.py names.
bench-calibrate: develop
	$(BIN)/python -m moeplan.benchmarks.calibrate $(ROWS)


bench-silicon: develop
	$(BIN)/python -m moeplan.benchmarks.silicon --out benchmarks/results
bench-scaled-tables: develop
	$(BIN)/python -m moeplan.benchmarks.scaled_tables

bench-coherent: develop
	$(BIN)/python -m moeplan.benchmarks.coherent

bench-by-batch: develop
	$(BIN)/python -m moeplan.benchmarks.by_batch

bench-foresight: develop
	$(BIN)/python -m moeplan.benchmarks.foresight

bench-offload: develop
	$(BIN)/python -m moeplan.benchmarks.offload

# MODEL: what examples/tiny_moe/train.py wrote; without it the model is trained first.
bench-selection: develop
	$(BIN)/python -m moeplan.benchmarks.selection $(if $(MODEL),--model $(MODEL))

# One layer beside Transformers' and DeepSpeed-MoE's; the last are measured where DeepSpeed is installed.
bench-layers: develop
	for case in local link skew; do $(BIN)/python -m moeplan.benchmarks.layers --case $$case || exit 1; done

# Families that only Transformers computes, through profile, solve and run; goes on where it was stopped.
MINUTES ?= 90
bench-loop: develop
	$(BIN)/python -m moeplan.benchmarks.loop --minutes $(MINUTES)

# Twelve fixed lab settings and twelve drawn by SEED; goes on where it was stopped.
SEED ?= 1
bench-settings: develop
	$(BIN)/python -m moeplan.benchmarks.settings --seed $(SEED)

bench-crossover: develop
	for case in sharded map; do $(BIN)/python -m moeplan.benchmarks.crossover --case $$case || exit 1; done

bench-duplicates: develop
	$(BIN)/python -m moeplan.benchmarks.duplicates

# The pictures of docs/strategies.
bench-timelines: develop
	$(BIN)/python -m moeplan.benchmarks.timelines

# MOMENTS: of each strategy, drawn by SEED.
MOMENTS ?= 100
bench-kills: develop
	$(BIN)/python -m moeplan.benchmarks.kills --moments $(MOMENTS) --seed $(SEED)

# Of the service: generated requests, mutated documents, many clients, kills; SQLite and PostgreSQL; about an hour.
bench-service: develop
	$(BIN)/python -m moeplan.benchmarks.service --seed $(SEED)

# OLD: a checkout of the commit to compare with, by default one that is made for it.
bench-serving-search: develop
	$(BIN)/python -m moeplan.benchmarks.serving_search
	$(BIN)/python -m moeplan.benchmarks.serving_search --mixed

bench-search: develop
	$(BIN)/python -m moeplan.benchmarks.search $(if $(OLD),--old $(OLD))

bench-replication: develop
	$(BIN)/python benchmarks/replication.py

# TRACES: recorded routing to place on, by default the one that ships.
TRACES ?= examples/tiny_moe/trace.npz
bench-annealing: develop
	$(BIN)/python benchmarks/annealing.py $(TRACES)

bench-placement: develop
	$(BIN)/python benchmarks/placement.py $(TRACES)

# PAIRS: recorded routing, two traces of a model at a time; without them the one that ships.
bench-watch: develop
	$(BIN)/python -m moeplan.benchmarks.watch $(PAIRS)

bench-kernels: develop
	$(BIN)/python benchmarks/kernels.py

# ENGINES: where the engines' packages are unpacked to read our exports, about 600 MB.
ENGINES ?= build/engines
bench-engines: develop
	$(BIN)/python benchmarks/engines.py --folder $(ENGINES)

# The pictures of docs/page.md.
page-pictures: develop
	$(BIN)/python -m moeplan.benchmarks.page_pictures docs/page

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
