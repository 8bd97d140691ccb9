# make demo: train, sample, evaluate and report on real images. make test: the tests. Both create .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
PINNED := tests/tools/test_supply.py::test_all_that_is_installed_is_pinned_and_has_a_licence
# One process has all tests of a file, which share what they prepare.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test slow shuffled lowest check docs measured pictures notebooks mutants audit clean
.DEFAULT_GOAL := help
# An environment whose making failed has Python, but no pip: it is made anew.
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BIN)/.installed ## train DuMo-Any on handwritten digits and write runs/dumo-best/report.html (five to six minutes on two cores)
	$(BIN)/dumo train dumo-best
	$(BIN)/dumo sample runs/dumo-best
	$(BIN)/dumo evaluate runs/dumo-best --nfe 1,2
	$(BIN)/dumo report runs/dumo-best
	@echo '. $(BIN)/activate  puts dumo on the path'

test: $(BIN)/.developed ## run the tests; with SLOW=1 slow ones, too, as continuous integration does
	$(PYTEST) -m "not nightly$(if $(SLOW),, and not slow)"

slow: $(BIN)/.developed ## run what `make test` leaves out, with the tests of each night
	$(PYTEST) -m "slow or nightly" $$(grep -rlE 'mark\.(slow|nightly)|\btier(ed)?\(' --include='test_*.py' tests)

shuffled: $(BIN)/.developed ## run what continuous integration runs, in a random order, whose seed it prints
	$(PYTEST) -p randomly -m "not nightly"

lowest: $(LOWEST)/bin/.lowest ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	PYTEST_ADDOPTS='-W default::DeprecationWarning --deselect $(PINNED)' $(MAKE) test VENV=$(LOWEST)

check: $(BIN)/.developed ## lint, formatting, types, imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/circles.py

docs: $(BIN)/.developed ## write llms.txt and AGENTS.md, build the documentation: open site/index.html; count words, pages, and commands that tests run
	$(BIN)/python docs/agents.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tests/docs/page.py

measured: $(BIN)/.developed ## measure again what the pages show, and write its tables (half a day of two cores); needs DUMO_DATA
	$(BIN)/python docs/measure.py

pictures: $(BIN)/.developed ## draw the pictures of the pages from the shipped models and measured numbers; needs DUMO_DATA and Chromium
	$(BIN)/python docs/pictures.py

notebooks: $(BIN)/.developed ## run the notebooks and keep what they show (a quarter of an hour of two cores); needs DUMO_DATA
	$(BIN)/python docs/notebook.py

mutants: $(BIN)/.developed ## plant errors in the mathematics and show that a test catches each; with TESTED=1 those that `make test SLOW=1` sees
	$(BIN)/python tools/mutants.py $(if $(TESTED),--tested)

audit: $(BIN)/.developed ## licences of what is installed, and known vulnerabilities, where pip-audit can ask
	$(BIN)/python tools/audit.py

clean: ## remove the environment, the site and the caches, not the runs
	rm -rf $(VENV) $(LOWEST) site .pytest_cache .ruff_cache .import_linter_cache

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

# uv finds the lowest versions that fit together, and pip takes them as constraints. `make test` then finds all installed.
# Old libraries are deprecated by new ones, so these warnings are no errors there. What is installed is not what
# constraints.txt pins, so a test of that is left out.
$(LOWEST)/bin/.lowest: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --extra dev \
		--no-emit-package pip --no-emit-package setuptools --output-file $(LOWEST)/constraints.txt pyproject.toml
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[dev]'
	@touch $@ $(LOWEST)/bin/.developed $(LOWEST)/bin/.installed
