# `make demo` and `make test` work on a fresh clone: they build .venv once and use it again.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

# One thread a worker: two workers with a full thread pool each get in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: help setup demo test test-slow lint bench clean

help:
	@echo "make demo       train with and without differential privacy on a small public data set, print the statement"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that take longer"
	@echo "make lint       formatting, lint rules, types"
	@echo "make bench      measure the time of a private step"
	@echo "make setup      only build $(VENV) with everything for development"
	@echo "make clean      remove $(VENV) and caches"

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	@$(BIN)/dpkit demo

test: $(VENV)/.dev
	@$(PYTEST) -m "not slow" -n 2

# pytest exits with 5 when it finds no test: say so instead of reporting a success that never ran.
test-slow: $(VENV)/.slow
	@$(PYTEST) -m slow -n 2; code=$$?; \
	if [ $$code -eq 5 ]; then echo "make test-slow: no test is marked slow, nothing was run"; exit 0; fi; \
	exit $$code

# The type checker looks into every package that is imported, so it wants those of the extra `log` as well.
lint: $(VENV)/.slow
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m experiments.benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The stamps: .demo, .dev and .slow are as new as the last install of that extra. `dev` contains `demo`.
$(VENV)/.made:
	@echo "building $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing dpkit with what the demo needs (a few minutes the first time)"
	@$(INSTALL) ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing dpkit with what development needs (a few minutes the first time)"
	@$(INSTALL) ".[dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.slow: $(VENV)/.dev
	@echo "installing what only the slow tests and the type checker need"
	@$(INSTALL) ".[dev,log,mutation]"
	@touch $@
