VENV ?= .venv
PYTHON ?= python3
RUN = JAX_PLATFORMS=$(PLATFORM) $(VENV)/bin/python
PLATFORM ?= cpu
WORKDIR ?= runs/quickstart

.PHONY: quickstart test lint clean

# Everything that a bare machine needs; remade when the requirements change. Most modules of the
# dependencies are never imported: their bytecode is left to the first import.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --no-compile -e '.[test]'
	touch $@

# The main job: warm starts, ZPPO beside GRPO+buffer, a table, plots and a page.
quickstart: $(VENV)/.installed
	$(RUN) -m experiments.quickstart --config=ml_collections_configs/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/.installed lint
	$(RUN) -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder -m 'not slow'

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) runs
