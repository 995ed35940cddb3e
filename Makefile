# One command a verb. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 3
N ?= 1000000
# hundreds of servers are started: each compiles the whole package where the environment forbids to keep what was compiled
export PYTHONDONTWRITEBYTECODE :=
# a test that ran into its time limit, and nothing else, is tried once more, and the report says so (CONTRIBUTING.md)
RERUN := --reruns 1 --only-rerun "from pytest-timeout"
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help init quickstart demo test lint types unit contract cookbook fuzz chaos soak crash-points forms tower audit release examples bench bench-operation bench-gpu docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

init: ## .venv with everything that tests and linters need
	@$(PYTHON) scripts/install.py --venv $(VENV) --extras demo,test,dev

quickstart: ## install, start a server, run the demonstration, stop
	@$(PYTHON) scripts/install.py --venv $(VENV) --extras demo
	@$(BIN)/tinsmith demo --out curves

demo: quickstart ## the same

test: lint types unit ## everything that CI runs

lint: init ## ruff: format and rules
	@echo "ruff"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: init ## mypy, strict, over src
	@echo "mypy"
	@$(BIN)/mypy

unit: init ## the tests alone: three files at a time, then those that compare times one by one
	@$(BIN)/python -m pytest -q -m "not alone" $(RERUN) -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations 40
	@$(BIN)/python -m pytest -q -m alone $(RERUN) $$(grep -rl --include=test_*.py "mark\.alone" tests)

contract: init ## the contract suite with every supported SDK; prints which calls each of them made
	@$(BIN)/python -m scripts.contract_matrix

cookbook: init ## what tinker-cookbook makes of archives, then its recipes, offline against a fresh server; half an hour, RECIPES="NAME ..." for some
	@$(BIN)/python -c "from scripts.cookbook import environment; environment.python()"
	@TINSMITH_TEST_COOKBOOK=1 $(BIN)/python -m pytest -q tests/families/test_cookbook_weights.py
	@$(BIN)/python -m scripts.cookbook $(RECIPES)

fuzz: init ## a million broken inputs (N=... for more or fewer, goes on where it stopped), then requests that nobody thought of (half an hour)
	@$(BIN)/python -m tests.fuzz --count $(N)
	@TINSMITH_TEST_EXAMPLES=200 $(BIN)/python -m pytest --timeout 1200 tests/contract/test_document.py tests/contract/test_protobuf_bodies.py \
		tests/contract/test_strange_texts.py tests/flow/test_rebalancing.py tests/numerics/test_hostile_losses.py

chaos: init ## processes killed at random while clients work, and everything compared with an undisturbed server. KILLS=500, ARGS="--seed N"
	@$(BIN)/python -m tests.crash.chaos --kills $(or $(KILLS),500) $(ARGS)
	@$(BIN)/python -m tests.crash.chaos --kills $(or $(REAL_KILLS),40) --device cpu $(ARGS)
	@$(BIN)/python -m tests.crash.chaos --kills $(or $(DEFAULT_KILLS),20) --device cpu --default-mode $(ARGS)

soak: init ## an hour of tenants that come and go, with a kill every minute: flat memory and disk, no stuck future. MINUTES=60
	@$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),60) --runs 16 --tenants

crash-points: init ## workers die at each named point, early and late, and at random ones, and the power is lost, a hundred times (half an hour)
	@TINSMITH_TEST_DEATHS=100 $(BIN)/python -m pytest -q --timeout 1200 tests/crash/test_crash_points.py tests/crash/test_power_loss.py tests/crash/test_giving.py

forms: init ## every form of weights and every dtype with every family, decode steps as on a GPU with every family, and the memory that loading and merging each takes (ten minutes)
	@TINSMITH_TEST_ALL_FORMS=1 $(BIN)/python -m pytest -q tests/families/test_quantised.py tests/families/test_halves.py tests/families/test_static_steps.py tests/numerics/test_loading_memory.py tests/numerics/test_merging_memory.py

tower: init ## adapters of vision towers, every family in every test, and once through the SDK (three minutes)
	@TINSMITH_TEST_TOWER=1 $(BIN)/python -m pytest -q tests/families/test_tower.py tests/contract/test_tower.py

examples: init ## every example from beginning to end, each judged by what it learned (six minutes)
	@TINSMITH_TEST_EXAMPLES_LEARN=1 $(BIN)/python -m pytest -q tests/examples

audit: init ## known weaknesses of the pinned dependencies; without its service it says so and fails nothing
	@$(BIN)/python -m scripts.audit

release: init ## dist/: sdist, wheel, bill of materials (CycloneDX) and checksums, after the audit
	@$(BIN)/python -m scripts.release

bench: init ## the CPU benchmarks, ours and the peer in the same run; writes docs/benchmarks.md
	@$(BIN)/python benchmarks/run_all.py

bench-operation: init ## durability, fairness, overload, polls, quotas, forms of weights, mixtures; writes docs/benchmarks-operation.md
	@$(BIN)/python benchmarks/run_all.py --table operation

bench-gpu: init ## the table of one NVIDIA GPU; writes docs/benchmarks-gpu.md. ROWS="train-8b ..." for some, within ten minutes
	@$(BIN)/python benchmarks/bench_gpu.py $(if $(ROWS),--only $(ROWS))

docs: init ## the pages that are generated from the code
	@$(BIN)/python scripts/make_settings_page.py
	@$(BIN)/python scripts/make_metrics_table.py
	@$(BIN)/python scripts/make_board.py

clean: ## remove what the other verbs made
	rm -rf $(VENV) .venv-* .cookbook build dist curves .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
