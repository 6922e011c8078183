# `make demo` and `make test` set up everything they need in .venv, and re-use it while it is current.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What this machine can use: the TensorRT-RTX builder on Linux x86-64; beside an NVIDIA driver the rest of TensorRT and
# ONNX Runtime's package for CUDA, else that for the CPU. The two write over one another's files: the other one goes first.
EXTRAS := dev,train,openvino,serve
ifeq ($(shell uname -sm),Linux x86_64)
EXTRAS := $(EXTRAS),tensorrt-rtx
endif
ifneq ($(shell command -v nvidia-smi),)
EXTRAS := $(EXTRAS),tensorrt,gpu
OTHER_ONNXRUNTIME := onnxruntime
else
EXTRAS := $(EXTRAS),cpu
OTHER_ONNXRUNTIME := onnxruntime-gpu
endif

.PHONY: help install demo test test-slow test-browser test-gpu gpu-report interop lint format bench benchmarks-page clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Set up the virtual environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sdkd needs Python 3.11 or newer, found: $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@! $(BIN)/python -m pip show --quiet $(OTHER_ONNXRUNTIME) 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	@echo "Installing sdkd[$(EXTRAS)] into $(VENV) (about 2.5 GB with all it needs; once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: install ## The whole way on this machine: students, distillation, engines, comparison -> artifacts/demo
	@$(BIN)/sdkd demo $(ARGS)

# Two processes at most, each with one thread: tests wait on Python more than on arithmetic, and each holds up to 2 GB.
test: install ## The fast tests (CPU)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: install ## Full-size models: minutes and gigabytes
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-browser: install ## The HTML report in headless Chromium
	@$(BIN)/python -m pytest -m browser $(ARGS)

# INSTALLED=1 installs nothing, for a machine without a network: PYTHON, or `python` of the PATH, has what is needed.
# There without this project's pytest options, since plugins that they are for may be missing.
GPU_PYTHON := $(if $(INSTALLED),$(if $(filter file,$(origin PYTHON)),python,$(PYTHON)),$(BIN)/python)
GPU_NEEDS := $(if $(INSTALLED),,install)

test-gpu: $(GPU_NEEDS) ## Tests that need a CUDA device
	@$(GPU_PYTHON) -m pytest $(if $(INSTALLED),-o addopts=) -m gpu $(ARGS)

gpu-report: $(GPU_NEEDS) ## Measure everything on a CUDA machine, in 9 minutes -> benchmarks/
	@$(GPU_PYTHON) tools/gpu_report.py $(ARGS)

interop: install ## Optimum and stable-diffusion.cpp beside us, in .venv-interop (1.3 GB, made once)
	@$(BIN)/python -m pytest -m interop $(ARGS)

lint: install ## ruff, mypy --strict, import floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: install ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

benchmarks-page: install ## Write docs/benchmarks.md and the README's table
	@$(BIN)/python tools/benchmarks_page.py $(ARGS)

bench: install ## Measure on this machine -> benchmarks/
	@$(BIN)/python tools/bench.py $(ARGS)

clean: ## Remove the virtual environments, caches and artifacts
	@rm -rf $(VENV) .venv-interop .venv-interop.lock .venv-peers .venv-peers.lock artifacts build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
