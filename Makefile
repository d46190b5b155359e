# Two commands, each complete on a fresh machine with Python 3.11 or newer:
#
#   make demo    train on a small data set and write figures and tables to demo-output/
#   make test    run the default test suite
#
# Both first create .venv and install the package with the versions of constraints.txt (once).

PYTHON ?= python3
OUT ?= demo-output

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.qbmscvi-installed
DOCS_STAMP := $(VENV)/.qbmscvi-docs-installed

export MPLBACKEND ?= Agg
# The matrices are small: a second thread gains little, and loses much where another program wants the core.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Two tests at a time on two cores; one at a time (`PARALLEL=`) shows output as it comes.
PARALLEL ?= --numprocesses=auto --maxprocesses=4 --dist=worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-scvi lint docs tutorials dist clean distclean

help:
	@echo 'make demo        train on a small data set, write figures and tables to $$OUT'
	@echo '                 variables: DATA (an .h5ad file), BATCH_KEY, LABEL_KEY, OUT, ARGS'
	@echo 'make test        default test suite; ARGS is passed to pytest'
	@echo 'make test-slow   the tests that take minutes'
	@echo 'make test-scvi   the tests of SCVI in scvi-tools, with QBMSCVI in its place'
	@echo 'make lint        ruff check, ruff format --check, import contracts'
	@echo 'make docs        the site, in build/site; runs the tutorials, warnings are errors'
	@echo 'make tutorials   the tutorials alone'
	@echo 'make dist        wheel and sdist in dist/, checked and installed into an empty environment'
	@echo 'make install     create .venv only (PYTHON chooses the interpreter: $(PYTHON))'
	@echo 'make clean       remove caches and build products; distclean removes .venv as well'

install: $(STAMP)

# An existing .venv is kept: only the packages in it are brought to the tested versions.
$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), but qbmscvi needs Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)" || { \
	  rm -rf "$(VENV)"; echo "error: no virtual environment could be made (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }

# torch goes first and alone, so that no other version of it is ever looked at.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing qbmscvi and its tested dependencies (once, a few minutes)"
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --editable ".[test]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m qbmscvi.demo \
	  $(if $(DATA),--data "$(DATA)") \
	  $(if $(BATCH_KEY),--batch-key "$(BATCH_KEY)") \
	  $(if $(LABEL_KEY),--label-key "$(LABEL_KEY)") \
	  --out "$(OUT)" $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m "slow and not hardware" $(ARGS)

test-scvi: $(STAMP)
	@$(BIN)/python tests/scvi_suite.py $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

# The site has packages of its own; they come into the same environment.
$(DOCS_STAMP): $(STAMP)
	@echo "Installing what the site needs (once)"
	@$(PIP_INSTALL) --editable ".[docs]"
	@touch $@

docs: $(DOCS_STAMP)
	@$(BIN)/python -m sphinx -W --keep-going --quiet -c docs -d build/doctrees -b html . build/site
	@echo "Open build/site/docs/index.html"

tutorials: $(STAMP)
	@$(BIN)/python -m pytest tests/test_documents.py -m "slow or not slow" -k notebook --durations=0 $(ARGS)

dist: $(STAMP)
	@rm -rf dist build/empty
	@$(PIP_INSTALL) build twine
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*
	@for built in dist/*.whl dist/*.tar.gz; do \
	  rm -rf build/empty && "$(PYTHON)" -m venv build/empty && \
	  build/empty/bin/python -m pip install --quiet --constraint constraints.txt torch && \
	  build/empty/bin/python -m pip install --quiet --constraint constraints.txt "$$built" && \
	  (cd build/empty && bin/python -m qbmscvi.samplers --check gibbs) || exit 1; \
	done

clean:
	@rm -rf build dist docs/generated .coverage .coverage.* htmlcov .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@rm -rf "$(VENV)"
