# Everything runs in .venv, which is made when it is missing or pyproject.toml has changed.
PYTHON ?= python3
BIN = .venv/bin
# Where there is no GPU, the pinned CPU build; on a GPU machine: make TORCH="torch>=2.8" ...
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.8,torch==2.13.0)

.PHONY: demo test test-all gpu clean
OUT ?= $(CURDIR)/gpu-results

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip setuptools wheel ninja numpy
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: .venv/installed  ## self-play on the embedded model
	$(BIN)/alphaspin-train

test: .venv/installed  ## tests, linters, types: what CI runs
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright -p pyproject.toml --pythonpath $(BIN)/python
	ALPHASPIN_EXPECT_CSRC=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-all: .venv/installed  ## the same tests with more kill points and all model families
	@command -v chromium || command -v google-chrome || echo "no chromium: tests/test_browser.py is skipped"
	ALPHASPIN_SWEEP=1 ALPHASPIN_EXPECT_CSRC=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

gpu:  ## on a CUDA machine: kernel tests, benchmarks, a profile, into $(OUT); 9 minutes at most
	PYTHONPATH=.:kernels:tests:$$PYTHONPATH timeout -k 5 540 $(PYTHON) benchmarks/gpu.py "$(OUT)"

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
