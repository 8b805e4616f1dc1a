# Everything a developer needs; `make` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Run the whole pipeline on simulated operations and show the result
	$(BIN)/metering demo

.PHONY: test
test: setup lint ## Lint, types, import contracts and all tests against real servers
	$(BIN)/python -m pytest

.PHONY: lint
lint: setup ## Style, types and import contracts only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: test-deep
test-deep: setup ## 2,000 random lives of credits against their model, and the API against its document
	LIFE_EXAMPLES=2000 $(BIN)/python -m pytest tests/integration/ledger/test_life_of_credits.py
	OPENAPI_EXAMPLES=200 $(BIN)/python -m pytest tests/integration/api/test_openapi.py

.PHONY: mutants
mutants: setup ## Break the code on purpose, one guard at a time, and see the tests go red
	$(BIN)/python -m tests.mutants

.PHONY: bench
bench: setup ## Measure drains, holds, resets, reconciliation and the gate
	$(BIN)/python -m benchmarks apply
	$(BIN)/python -m benchmarks holds
	$(BIN)/python -m benchmarks resets
	$(BIN)/python -m benchmarks reconcile
	$(BIN)/python -m benchmarks gate

.PHONY: openapi
openapi: setup ## Write docs/openapi.json anew, after a change of the API
	$(BIN)/python -m api.openapi > docs/openapi.json

.PHONY: chaos
chaos: setup ## Replay a large file while workers and servers are killed
	$(BIN)/python -m pytest tests/acceptance -m chaos --chaos-events 20000

.PHONY: setup
setup: $(VENV)/.complete ## Make .venv with everything in it

$(VENV)/.complete: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: lock
lock: setup ## Renew requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev \
		--generate-hashes --no-emit-index-url --no-header pyproject.toml --output-file requirements.lock

.PHONY: clean
clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
