# `make demo` and `make test` set up all they need in .venv; nothing has to be activated.
VENV ?= .venv
PYTHON ?= python3
KEY := $(shell cksum < pyproject.toml | tr ' ' '-')
READY := $(VENV)/ready-$(KEY)
HERE := $(VENV)/here-$(shell pwd | cksum | tr ' ' '-')

.PHONY: demo test faults unit check setup bench clean

demo: setup
	$(VENV)/bin/lesion run degrade --subject smollm2 --method mult-gauss \
	  --site attention.value mlp embedding --doses 0 0.1 0.2 0.4 0.8 \
	  --repeats 2 --documents 12 --tokens 128 --new-tokens 24 \
	  --measures perplexity displacement generation prose

test: setup check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -v tests

faults: setup
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -v tests/faults tests/integration/test_slurm.py tests/integration/test_submit.py

unit: setup
	$(VENV)/bin/python -m pytest tests/unit

check: setup
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --quiet --check .
	$(VENV)/bin/mypy

bench: setup
	for file in benchmarks/*.py; do echo "== $$file"; $(VENV)/bin/python $$file || exit 1; done

setup: $(READY) $(HERE)

# The dependencies, once for each version of pyproject.toml.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lesion needs Python 3.11 or newer, this is " + sys.version)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

# A virtual environment that was made in another checkout points there until it is told.
$(HERE): $(READY)
	@rm -f $(VENV)/here-*
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf .venv lab .pytest_cache .mypy_cache .ruff_cache .hypothesis
