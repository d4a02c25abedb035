# Every target makes .venv by itself: Python 3.11 or 3.12 and pip are enough. UV=1 installs with uv instead.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
UV ?= 0
ARGS ?=
# The deepspeed launcher starts `python`: the environment's own must come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install run test test-slow test-fuzz test-gpu measure-gpu test-memory test-triton-3.6 test-browser test-slurm check format clean

help:
	@printf '%s\n' \
	  'make run        distil the built-in world (ARGS="..." is passed on), and say where the report is' \
	  'make test       fast tests, CPU' \
	  'make test-slow  tests that start processes or train' \
	  'make test-fuzz  300 wrong videos, captions and shards' \
	  'make test-gpu   tests that need a CUDA device' \
	  'make measure-gpu  numerics, then every GPU benchmark; attention becomes the default it measures' \
	  'make test-memory  memory and collectives of real steps against the plan (part of test-slow)' \
	  'make test-browser  the live player in a headless chromium (apt-get installs it if need be)' \
	  'make test-triton-3.6  the kernels in the interpreter and as machine code with triton 3.6.0' \
	  'make test-slurm batch scripts under a real Slurm, installed by apt-get where absent (root)' \
	  'make check      ruff, import-linter, basedpyright' \
	  'make format     let ruff rewrite what it can' \
	  'make install    the environment alone (UV=1: with uv)' \
	  'make clean      remove caches and builds; outputs/ and .venv stay'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
ifeq ($(UV),1)
	uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps mosaicml-streaming
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps mosaicml-streaming
endif
	@touch $@

run: $(STAMP)
	deepspeed launch/train.py --ds_config configs/zero3.json $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile

# Beside the environment, not in it: transformers and diffusers change what they do where they find this package.
HUB := .venv-hub
HUB_STAMP := $(HUB)/installed.stamp

$(HUB_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(HUB) 'kernels>=0.15'
	@touch $@

test-slow: $(STAMP) $(HUB_STAMP)
	python -m pytest -q -m "slow and not gpu"

test-fuzz: $(STAMP)
	python -m pytest -q -m slow tests/afd/preparation/test_fuzz.py

test-gpu: $(STAMP)
	python -m pytest -q -m gpu

measure-gpu: $(STAMP)
	@python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "needs a CUDA device, torch sees none")'
	python -m pytest -q -m gpu
	python benchmarks/attention.py --write_defaults
	python benchmarks/kernels.py --op all
	python benchmarks/step.py

test-memory: $(STAMP)
	python -m pytest -q -m slow tests/afd/planning/test_measured.py

test-browser: $(STAMP)
	bash tests/install_browser.sh
	python -m pytest -q -m browser

# torch 2.11 pins triton 3.6.0, whose interpreter needs numpy < 2.4. Both go before the environment's own on the path.
OLD_TRITON := .venv-triton-3.6
OLD_TRITON_STAMP := $(OLD_TRITON)/installed.stamp

$(OLD_TRITON_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLD_TRITON) \
	  triton==3.6.0 'numpy>=2.1,<2.4'
	@touch $@

test-triton-3.6: $(OLD_TRITON_STAMP)
	PYTHONPATH="$(CURDIR)/$(OLD_TRITON)" python -m pytest -q tests/afd_kernels $(ARGS)

test-slurm: $(STAMP)
	@tests/launch/slurm/install.sh
	PATH="$$PATH:/usr/sbin:/sbin" python -m pytest -q -m slurm tests/launch  # slurmctld and slurmd live there

check: $(STAMP)
	ruff format --check .
	ruff check .
	lint-imports
	basedpyright

format: $(STAMP)
	ruff format .
	ruff check --fix .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
