# make demo: train, sample, evaluate and report on real images. make test: the tests. Both create .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One process has all tests of a file, which share what they prepare.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test slow check docs mutants clean
.DEFAULT_GOAL := help
# An environment whose making failed has Python, but no pip: it is made anew.
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BIN)/.installed ## train DuMo-Any on handwritten digits and write runs/dumo-best/report.html (three minutes on two cores)
	$(BIN)/dumo train dumo-best steps=2650
	$(BIN)/dumo sample runs/dumo-best
	$(BIN)/dumo evaluate runs/dumo-best --nfe 1,2
	$(BIN)/dumo report runs/dumo-best
	@echo '. $(BIN)/activate  puts dumo on the path'

test: $(BIN)/.developed ## run the tests; with SLOW=1 slow ones, too, as continuous integration does
	$(PYTEST) -m "not nightly$(if $(SLOW),, and not slow)"

slow: $(BIN)/.developed ## run what `make test` leaves out, with the tests of each night
	$(PYTEST) -m "slow or nightly" $$(grep -rlE 'mark\.(slow|nightly)|\btier(ed)?\(' --include='test_*.py' tests)

check: $(BIN)/.developed ## lint, formatting, types, imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(BIN)/.developed ## build the documentation: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

mutants: $(BIN)/.developed ## plant errors in the mathematics and show that a test catches each; with TESTED=1 those that `make test SLOW=1` sees
	$(BIN)/python tools/mutants.py $(if $(TESTED),--tested)

clean: ## remove the environment, the site and the caches, not the runs
	rm -rf $(VENV) site .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"dumo needs Python 3.11 or newer; this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing into $(VENV)'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(BIN)/.developed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing into $(VENV)'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(BIN)/.installed
