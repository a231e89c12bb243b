# Every target sets itself up in .venv; nothing but Python 3.11+, git and make is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
DIR ?=

.PHONY: demo test check fix fixtures sweep fuzz soak bench bench-gpu test-gpu clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: .venv/ready  ## a small real model, served with its page and asked one question; Ctrl-C ends it
	@$(BIN)/fewbit demo || [ $$? -eq 130 ]

test: .venv/ready  ## everything that runs on a CPU
	$(BIN)/python -m pytest -n 2 -m "not slow and not checkpoints"

check: .venv/ready  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fixtures: .venv/ready  ## the table of figures: every checkpoint against its reference (DIR=folder for your own)
	FEWBIT_TEST_CHECKPOINTS=$(DIR) $(BIN)/python -m pytest -m checkpoints -s -p no:xdist

sweep: .venv/ready  ## every causal-LM type of transformers, compared with transformers; rewrites docs/sweep.md
	$(BIN)/python -m tests.sweep.sweep

fuzz: .venv/ready  ## hostile files, for 60 seconds
	$(BIN)/python tests/fuzz/fuzz_files.py --seconds 60

soak: .venv/ready  ## ten minutes of load; memory, descriptors, threads and pages end where they began
	$(BIN)/python -m tests.server.soak --seconds 600

bench: .venv/ready
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/read_safetensors.py

bench-gpu:  ## tokens a second of the engine beside vLLM's on one NVIDIA GPU; makes 16 GB of random weights once (DIR=)
	$(PYTHON) benchmarks/gpu_engine.py $(or $(DIR),.cache/bench-gpu) --repeat 1

test-gpu:  ## on a machine with a GPU, in the environment that is there; kernels compile in all processors at once
	$(PYTHON) -m pytest -m "gpu and not slow" -n auto --maxprocesses 14 -p no:cacheprovider -p no:benchmark

clean:
	rm -rf .venv .cache build *.egg-info
