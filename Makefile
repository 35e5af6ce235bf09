# The names of stages, all in one place. RESTORED are stages whose outputs come out of the committed store; data are drawn by code
RESTORED := base evaluators story
STUDIES  := tuning phenomenon table fronts courses attack hypergradients claims summary

# Tests side by side: one a core, unless told otherwise (make test LANES=1)
LANES ?= $(shell nproc 2>/dev/null || echo 2)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN  := $(CURDIR)/$(VENV)/bin
# Stages and pages call python, papermill and jupyter by name: they must be the environment's own
export PATH := $(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONNOUSERSITE := 1
export PYTHONHASHSEED := 0
export TOKENIZERS_PARALLELISM := false
export DVC_NO_ANALYTICS := 1
# empty: modules are compiled once, whatever the shell says, and not by every process anew
export PYTHONDONTWRITEBYTECODE :=
unexport PYTHONPATH PYTHONHOME JUPYTER_PATH

# Nothing here asks a model hub for anything; real profiles do, and are run by `dvc` directly
OFFLINE := test test-faults test-full mutants reproduce table figures reproduce-all bench bench-gpu readme docs
$(OFFLINE): export HF_HUB_OFFLINE := 1
$(OFFLINE): export TRANSFORMERS_OFFLINE := 1
$(OFFLINE): export MPLBACKEND := agg

.PHONY: help env no-git restore reproduce table figures reproduce-all bench bench-gpu test test-faults test-full mutants readme docs lab clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ------------------------------------------------------------------ the environment
# An interpreter may be named: make env PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# Further arguments for pip, for instance where to find a CPU build of torch
PIPFLAGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
LOCKS := requirements.lock requirements-oracle.lock requirements-fidelity.lock

env: $(VENV)/.stamp ## make .venv from requirements.lock

$(VENV)/.stamp: $(LOCKS) setup.py settings.ini pyproject.toml
	@$(BIN)/python -c 'import pip' 2>/dev/null || { \
	  py="$(PYTHON)"; test -n "$$py" || { echo 'make: no Python 3.11 or newer found (diffusers 0.42 needs it); name one: make env PYTHON=...' >&2; exit 1; }; \
	  "$$py" -m venv --clear $(VENV); }
	@echo 'Installing the locked environment into $(VENV) (some minutes the first time) ...'
	@step() { "$$@" >> $(VENV)/install.log 2>&1 || { grep -v 'is ignored: it is neither' $(VENV)/install.log | tail -n 25 | cut -c 1-400 >&2; \
	    echo 'make: $(VENV) could not be installed; the whole log is $(VENV)/install.log' >&2; exit 1; }; }; \
	  : > $(VENV)/install.log; \
	  step $(PIP) install --no-compile $(PIPFLAGS) -r requirements.lock; \
	  step $(PIP) install --no-compile $(PIPFLAGS) --no-deps -r requirements-oracle.lock; \
	  step $(PIP) install --no-compile $(PIPFLAGS) --no-deps --target $(VENV)/oracle -r requirements-fidelity.lock; \
	  step $(PIP) install --no-deps --no-build-isolation -e .; \
	  $(BIN)/python -m compileall -q -j $(LANES) $(VENV)/lib $(VENV)/oracle >> $(VENV)/install.log 2>&1 || true; \
	  step $(BIN)/python -c 'from diffusers import StableDiffusionPipeline; import peft, curvlinops, torchopt, nbdev.test, papermill, dvc'
	@# kernels: no words about their transport, about widgets (progress is plain text here) or about torchvision (not needed)
	@mkdir -p $(VENV)/etc/ipython && printf '%s\n' 'c.IPKernelApp.log_level = 40' \
	  'c.IPKernelApp.exec_lines = ["import os, warnings; os.environ.setdefault(\"TRANSFORMERS_VERBOSITY\", \"error\"); warnings.filterwarnings(\"ignore\", message=\"IProgress\")"]' \
	  > $(VENV)/etc/ipython/ipython_kernel_config.py
	@touch $@

# ------------------------------------------------------------------ the main job
no-git: env # a ZIP has no .git, which dvc asks for unless told
	@test -e .git || $(BIN)/dvc config --quiet --local core.no_scm true

restore: no-git # base model, evaluators and the story's adapters from the committed store, nothing else
	@if test -f dvc.lock; then $(BIN)/dvc pull --quiet $(RESTORED); else echo 'no dvc.lock yet: nothing restored'; fi

reproduce: restore ## six methods, one seed, in a copy of its own, against what is committed (5 minutes on 2 cores with AVX-512)
	@$(BIN)/python tools/reproduce.py --workers $(LANES)

table: restore ## the main table: every method, every seed; writes results/
	@$(BIN)/dvc repro table

figures: restore ## every study of models, and the ledger; writes results/
	@$(BIN)/dvc repro $(STUDIES)

reproduce-all: no-git ## everything, base model and evaluators too (a night; resumes after an interruption); writes results/
	@$(BIN)/dvc repro

# ------------------------------------------------------------------ what it costs
bench: restore ## time, memory and error of an outer step against the published procedure (under ten minutes)
	@$(BIN)/dvc repro --force --single-item bench

bench-gpu: env ## the same at the size of SD v1.4, for real: needs a CUDA GPU and a CUDA build of torch
	@$(BIN)/python -c 'from resalign.use.cli import command; from resalign.studies.sd14 import bench_gpu; command(bench_gpu)()' --out results/tables/bench_gpu.csv

# ------------------------------------------------------------------ the house
test: restore ## the gate: rules of the house, unit tests, every page from top to bottom
	@$(BIN)/python -m pytest -n $(LANES) $(PYTEST)

test-faults: restore ## kills, full disks, bad input, hostile files, 10,000 prompts: all cases; writes results/tables/survival.csv
	@FAULTS=full $(BIN)/python -m pytest tests/test_faults.py tests/test_faults_input.py $(PYTEST)

test-full: env ## every command on a pipeline of SD v1.4's size with random weights: 16 GB of memory, 10 GB of disk (FULL=FOLDER keeps it)
	@FULL="$(FULL)" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/test_full_size.py $(PYTEST)

mutants: restore ## small faults, one at a time: do the fast tests notice? (under an hour; resumable; results/tables/mutants.csv)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py --lanes $(LANES)

readme: env ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: env ## the site, under _docs/html: all pages, the ledger, an explorer of results; needs no network, opens from the disk
	@$(BIN)/python tools/docs.py

lab: env ## JupyterLab on the pages
	@cd nbs && $(BIN)/jupyter lab index.ipynb

clean: ## remove what tests and editors leave behind (not .venv, not outs)
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints -o -name .pytest_cache \
	  -o -name .hypothesis -o -name '*.egg-info' \) -prune -exec rm -rf {} +
	@rm -rf build _proc _docs
