"""Collected where ALPHASPIN_VLLM_PYTHON names an interpreter with vLLM: `make test-engines`."""

import os

collect_ignore_glob = [] if os.environ.get("ALPHASPIN_VLLM_PYTHON") else ["test_*.py"]
