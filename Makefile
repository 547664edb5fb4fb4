# Needs python3 (3.11 or newer), git and make. Everything else goes into .venv, at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# processes that run tests side by side; 0 runs them one after another
WORKERS ?= 2

.PHONY: demo test lint types floors setup clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then prune, recover, sample, measure and show the digits model: runs/digits/report.html"
	@echo "make test    set up, then lint, types, floors and all tests"
	@echo "make lint    ruff: rules and format"
	@echo "make types   mypy on src"
	@echo "make floors  import-linter: imports only point down"
	@echo "make setup   $(VENV) with the package (editable) and its development tools: about 2 GB, some minutes"
	@echo "make clean   remove caches and build leftovers; $(VENV) and runs stay"
	@echo "WORKERS=8 make test runs tests in as many processes (2 otherwise; 0: one after another)"
	@echo "PYTHON=python3.12 make ... chooses the interpreter that $(VENV) is made with"

demo: $(READY)
	$(BIN)/tinyfusion run --recipe digits --out runs/digits
	@echo "the page: $(CURDIR)/runs/digits/report.html"
	@echo "to type tinyfusion in this shell: source $(VENV)/bin/activate"

test: lint types floors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

floors: $(READY)
	$(BIN)/lint-imports --no-logo

setup: $(READY)

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: no $(PYTHON) here: install Python 3.11 or newer, or name one, as in: make PYTHON=python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: tinyfusion needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -V 2>&1): name another, as in: make PYTHON=python3.12" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: python3-venv)" >&2; exit 2; }

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "set-up: torch and the other packages go into $(VENV), about 2 GB (with torch for CUDA several more); some minutes, by network"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "ready; to type tinyfusion in this shell: source $(VENV)/bin/activate"

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
