# One environment for everything; `make demo` and `make test` create it on a fresh clone. Modules are compiled on their
# first import, as most are never imported; PYTHONDONTWRITEBYTECODE would have them compiled again at every start.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-timm check-weights ship lint wheel

demo: $(STAMP)  ## train, save, reload and evaluate on scikit-learn's digits
	$(BIN)/timm-lm demo

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

test-timm: $(STAMP)  ## timm's own model tests, on our networks
	$(BIN)/python tests/timm_suite.py

check-weights: $(STAMP)  ## count the errors of all shipped weights; DATA holds the folders cifar10 and cifar100
	$(BIN)/python -m timm_lm.check_weights $(DATA)

ship: $(STAMP)  ## ship weights of finished RUNS in half precision; DATA: where the data is now
	$(BIN)/python -m timm_lm.ship $(RUNS) $(if $(DATA),--data-dir $(DATA))

lint: $(STAMP)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(STAMP)  ## build wheel and source distribution in dist/
	$(BIN)/python -m hatchling build

$(STAMP): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
