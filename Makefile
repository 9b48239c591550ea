# Two commands set everything up on a fresh machine: make demo and make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test test-deploy check format bench bench-round bench-secagg bench-private bench-deploy clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[simulation]"
	touch $@

$(VENV)/.check: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[check]"
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## a coordinator and three hospitals, over TLS, train a CNN and an LSTM
	$(BIN)/hospitium demo

test: $(VENV)/.check  ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test-deploy: $(VENV)/.check  ## run the long tests of the whole deployment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m deploy

check: $(VENV)/.check  ## lint, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.check  ## put the code in its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-round bench-secagg bench-private bench-deploy  ## every benchmark; figures in bench-results/

bench-round: $(VENV)/.check  ## what a simulated federation costs on top of bare training
	$(BIN)/python -m hospitium_simulations.benchmarks.round

bench-secagg: $(VENV)/.check  ## secure aggregation against Flower's SecAgg+
	$(BIN)/python -m hospitium_simulations.benchmarks.secagg

bench-private: $(VENV)/.check  ## private training against plain PyTorch and Opacus
	$(BIN)/python -m hospitium_simulations.benchmarks.private

bench-deploy: $(VENV)/.check  ## a deployed round against stock Flower
	$(BIN)/python -m hospitium_simulations.benchmarks.deployment

clean:  ## remove what was built here
	rm -rf $(VENV) bench-results runs
