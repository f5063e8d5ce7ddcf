# The one entry to everything that a person or a machine does with this repository; CI calls these targets too.
#   PYTHON       the interpreter that makes the virtual environment
#   VENV         the virtual environment; made and filled on first use, refilled when a dependency changes
#   PYTEST_ARGS  options for pytest; each worker loads torch, so the default stays small
PYTHON ?= python3.11
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Every folder with a pyproject.toml is a package of ours, installed so that edits take effect at once. The toy plugin
# stands for a stranger's: it is installed as a copy, from nothing but its own pyproject.toml.
PACKAGES := $(patsubst %/pyproject.toml,%,$(wildcard core/pyproject.toml kernels/pyproject.toml plugins/*/pyproject.toml))
TOY := $(patsubst %/pyproject.toml,%,$(wildcard tests/toy_plugin/pyproject.toml))
TOY_FILES := $(if $(TOY),$(shell find $(TOY) -name '*.py' -o -name '*.toml'))
# What is compiled when it is installed, and only then.
C_SOURCES := $(wildcard kernels/CMakeLists.txt kernels/csrc/*)
PYPROJECTS := $(addsuffix /pyproject.toml,$(PACKAGES))

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test check lint types contracts tests torch format wheels clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(STAMP) ## the virtual environment, with every package and tool

# pip goes first: the one that comes with Python may be too old for build constraints.
$(STAMP): constraints.txt requirements-dev.txt $(PYPROJECTS) $(TOY_FILES) $(C_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) --build-constraint constraints.txt -r requirements-dev.txt $(PACKAGES:%=-e ./%) $(TOY:%=./%)
	touch $@

demo: $(STAMP) ## fetch a small model and show what quantdock does with it
	$(BIN)/python demo/fetch_model.py
	$(BIN)/python demo/run.py

test: tests ## the same as tests

check: lint types contracts tests torch ## everything that has to pass before a change goes in

lint: $(STAMP) ## style, likely bugs, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## strict type checking
	$(BIN)/mypy

contracts: $(STAMP) ## who may import whom
	$(BIN)/lint-imports --no-logo

tests: $(STAMP) ## the tests of all packages
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# What quantizes, again without the compiled kernels: as where they are not installed.
torch: $(STAMP) ## the tests of what kernels make faster, without kernels
	QUANTDOCK_KERNELS=off $(BIN)/python -m pytest $(PYTEST_ARGS) $(wildcard core/tests/test_ops*.py core/tests/test_linears.py) plugins/bnb/tests $(filter-out %/test_triton.py %/test_activations.py,$(wildcard plugins/fp8/tests/test_*.py)) $(wildcard plugins/awq/tests/test_packing.py plugins/awq/tests/test_search.py plugins/torchao/tests/test_arithmetic.py plugins/quanto/tests/test_arithmetic.py) tests/test_bnb_parity.py

format: $(STAMP) ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each wheel is built from the source archive, so a file that the archive lacks is found here.
wheels: $(STAMP) ## source archives and wheels of all packages, in dist/
	rm -rf dist
	set -e; for package in $(PACKAGES); do \
	  PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist $$package; \
	done

clean: ## remove what these targets made, except $(VENV) and the fetched model
	rm -rf dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
