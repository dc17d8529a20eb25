import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterable

import pytest
import torch
from implementations import force

__all__ = ["force"]


@pytest.fixture(autouse=torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ)
def fresh_device() -> Generator[None]:
    """After an error that stays in the CUDA context, end this worker; xdist starts another."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with many cases in Triton's interpreter, half in CI, by lot; all on a GPU and in
    `make test-all`, and whatever is asked for by name."""
    everything = torch.cuda.is_available() or os.environ.get("ALPHASPIN_SWEEP")
    if everything or config.option.keyword or any("::" in x for x in config.args):
        return
    left_out = {item for item in interpreted(items) if zlib.crc32(item.nodeid.encode()) % 2}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def interpreted(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Those of kernels' tests with at least eight cases."""
    ours = [x for x in items if x.path.parent.name == "kernels" and "[triton" in x.name]
    cases = Counter(item.nodeid.split("[")[0] for item in ours)
    return [item for item in ours if cases[item.nodeid.split("[")[0]] >= 8]
