# Every target that needs an environment makes it first, once: `make test` or `make demo` is all
# that a fresh machine with Python >= 3.10 and make needs.

PYTHON ?= python3
PYTHON_OLDEST ?= $(shell for p in python3.10 $(PYTHON); do $$p -c "" 2>&- && echo $$p && break; done)
PYTHON_QUANDA ?= $(shell for p in python3.11 python3.12 $(PYTHON); do $$p -c "" 2>&- && echo $$p && break; done)
OUT ?= demo
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
QUANDA := .venv-quanda
COMMA := ,
NOTEBOOKS = $(wildcard tutorials/*.ipynb)

# One thread for each test worker: two workers with a thread each keep two cores busy, two workers
# with two threads each get in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help venv demo bench truth test test-long test-faults test-page lint format docs docs-links tutorials tutorials-full \
	test-captum test-oldest test-quanda clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp  ## make .venv from constraints.txt (the others do this themselves)

demo: $(VENV)/.stamp  ## train a looped GPT, attribute its answers, write a page and pictures to OUT=demo
	$(BIN)/python -m captum_sdi demo --out "$(OUT)"

test: $(VENV)/.stamp  ## run the tests and the examples in the docstrings (ARGS="-k sketch")
	$(call PYTEST,$(VENV)) -m "not long" --ignore tests/test_page_browser.py

test-long: $(VENV)/.stamp  ## run what `make test` leaves out: statistics over many draws, benchmarks in small
	$(call PYTEST,$(VENV)) -m long tests

test-faults: $(VENV)/.stamp  ## kill builders and scorers, fill disks, read 8,000 hostile files; `make test` tries fewer
	OMP_NUM_THREADS=1 CAPTUM_SDI_KILLS=20 $(BIN)/python -m pytest -n $(WORKERS) tests/test_index_faults.py \
		$(patsubst %,tests/test_faults_%.py,files kills disk hostile threads) $(ARGS)

test-page: $(VENV)/.stamp  ## look at the page in a browser; as root, installs Debian's chromium where there is none
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null; } || { \
		echo "no chromium here: install it (Debian: apt-get install chromium), then run this again"; exit 1; }
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_page_browser.py $(ARGS)

lint: $(VENV)/.stamp  ## check layout, style, docstrings and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.stamp  ## lay the code out and repair what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.stamp  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

docs-links: $(VENV)/.stamp  ## ask the network whether every link in the documentation still leads somewhere
	$(BIN)/python -m sphinx -b linkcheck -q docs docs/_build/links

bench: $(VENV)/.stamp  ## measure time, memory and error beside the reference package (ARGS="memory accuracy")
	$(BIN)/python benchmarks/run.py $(ARGS)

truth: $(VENV)/.stamp  ## what predicts retraining: all methods on models trained again (ARGS=--small)
	$(BIN)/python benchmarks/truth.py $(ARGS)

tutorials: $(VENV)/.stamp  ## execute the notebooks in small; their files stay as they are
	SMOKE_TEST=1 $(call PYTEST,$(VENV)) --nbmake --nbmake-timeout=300 $(NOTEBOOKS)

tutorials-full: $(VENV)/.stamp  ## execute them in full and write fresh outputs into them (NOTEBOOKS=...)
	@for notebook in $(NOTEBOOKS); do $(BIN)/python tutorials/execute.py $$notebook || exit 1; done

test-captum: $(VENV)/.stamp  ## run Captum's own influence tests on SDIInfluence (CAPTUM_TESTS=path)
	@test -n "$(wildcard $(CAPTUM_TESTS)/test_tracin_*.py)" || { \
		echo "no test_tracin_*.py in CAPTUM_TESTS='$(CAPTUM_TESTS)': check out https://github.com/meta-pytorch/captum"; \
		echo "and run: make test-captum CAPTUM_TESTS=path/to/captum/tests/influence/_core"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.captum_contract -n $(WORKERS) \
		$(wildcard $(CAPTUM_TESTS)/test_tracin_*.py) $(ARGS)

test-oldest: $(OLDEST)/.stamp  ## run the tests on the oldest versions that pyproject.toml admits
	$(call PYTEST,$(OLDEST)) -m "not long"

test-quanda: $(QUANDA)/.stamp  ## hold quanda's metrics on SDIInfluence to their definitions, beside captum 0.8
	OMP_NUM_THREADS=1 $(QUANDA)/bin/python -m pytest tests/test_quanda.py $(ARGS)

clean:  ## remove the environments, the caches and the demo's output
	rm -rf $(VENV) $(OLDEST) $(QUANDA) demo build dist *.egg-info docs/_build docs/tutorials
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: whatever build of the pinned version pip finds (a CPU one, say) satisfies
# everything that comes after it. $(1) the interpreter, $(2) the environment, $(3) its constraints
# file, $(4) the extra.
define make_venv
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "captum_sdi needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	$(1) -m venv $(2)
	$(2)/bin/python -m pip install -c $(3) torch
	$(2)/bin/python -m pip install -c $(3) -e ".[$(4)]"
	@touch $(2)/.stamp
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call make_venv,$(PYTHON),$(VENV),constraints.txt,dev)

$(OLDEST)/.stamp: pyproject.toml constraints-oldest.txt
	$(call make_venv,$(PYTHON_OLDEST),$(OLDEST),constraints-oldest.txt,test)

$(QUANDA)/.stamp: pyproject.toml constraints-quanda.txt
	$(call make_venv,$(PYTHON_QUANDA),$(QUANDA),constraints-quanda.txt,test$(COMMA)quanda)
