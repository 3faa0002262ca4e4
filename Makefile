# For a newcomer: `make demo` trains a small video model and shows what it predicts,
# `make test` checks everything. Both first make .venv and install into it what they need.

# The first interpreter that is new enough; or say which: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN := $(abspath $(VENV))/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
DEMO := --config=configs/tiny.py

.PHONY: demo test aot compile-aot soak lint

demo: $(VENV)/.installed-demo
	$(RUN)/python -m videogpt_jax.encode $(DEMO)
	$(RUN)/python -m videogpt_jax.main $(DEMO) --workdir=runs/tiny
	$(RUN)/python -m videogpt_jax.evaluate --checkpoint=runs/tiny --out=runs/tiny

# A file's tests stay in one process: they share what took long to make.
test: lint
	$(RUN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# Compiles for TPUs and GPUs that are not there. The compilers (2 GB) have an environment of
# their own: in any other, jax would look for the accelerators at every start.
aot:
	@$(MAKE) --no-print-directory VENV=$(VENV)-aot compile-aot

compile-aot: $(VENV)/.installed-aot
	VIDEOGPT_AOT=required $(RUN)/python -m pytest -q -m aot --confcutdir=tests/aot tests/aot

# Twenty interrupted and resumed runs, and whatever else takes too long for every day.
soak: $(VENV)/.installed-dev
	$(RUN)/python -m pytest -q -m soak

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check
	$(RUN)/mypy

$(VENV)/.installed-%: setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or name it:" \
	  "make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(RUN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing videogpt_jax[$*] and what it needs into $(VENV) (once; some minutes)"
	@$(PIP) install -qq -e '.[$*]'
	@touch $@
