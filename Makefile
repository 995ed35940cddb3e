# One command a verb. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
# a test that ran into its time limit, and nothing else, is tried once more, and the report says so (CONTRIBUTING.md)
RERUN := --reruns 1 --only-rerun "from pytest-timeout"
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help init quickstart demo test lint types unit contract cookbook fuzz crash-points bench bench-gpu docs clean

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

unit: init ## the tests alone: two files at a time, then those that compare times one by one
	@$(BIN)/python -m pytest -q -m "not alone" $(RERUN) -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
	@$(BIN)/python -m pytest -q -m alone $(RERUN)

contract: init ## the contract suite with every supported SDK; prints which calls each of them made
	@$(BIN)/python -m scripts.contract_matrix

cookbook: init ## the recipes of tinker-cookbook, offline against a fresh server; half an hour, RECIPES="NAME ..." for some
	@$(BIN)/python -m scripts.cookbook $(RECIPES)

fuzz: init ## requests and bodies that nobody thought of, hundreds for each route, other ones each time (half an hour)
	@TINSMITH_TEST_EXAMPLES=200 $(BIN)/python -m pytest --timeout 1200 tests/contract/test_document.py tests/contract/test_protobuf_bodies.py

crash-points: init ## workers die at each named point, early and late, and at random ones, and the power is lost, a hundred times (half an hour)
	@TINSMITH_TEST_DEATHS=100 $(BIN)/python -m pytest -q --timeout 1200 tests/crash/test_crash_points.py tests/crash/test_power_loss.py

bench: init ## the CPU benchmarks, ours and the peer in the same run; writes docs/benchmarks.md
	@$(BIN)/python benchmarks/run_all.py

bench-gpu: init ## the table of one NVIDIA GPU; writes docs/benchmarks-gpu.md. ROWS="train-8b ..." for some, within ten minutes
	@$(BIN)/python benchmarks/bench_gpu.py $(if $(ROWS),--only $(ROWS))

docs: init ## the pages that are generated from the code
	@$(BIN)/python scripts/make_settings_page.py

clean: ## remove what the other verbs made
	rm -rf $(VENV) .venv-* .cookbook build dist curves .mypy_cache .ruff_cache .pytest_cache .hypothesis
