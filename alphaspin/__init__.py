"""Self-play alignment of language models: α-SPIN and its relatives on one frozen base.

    from alphaspin import Config, play

    run = play(Config(model="my-sft", data="demonstrations.jsonl"))

The names below are imported when they are first used: torch takes seconds.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("Config", "load_config"), "config"),
    **dict.fromkeys(("Callback", "Result", "play", "evaluate", "export"), "api"),
    "InputError": "errors",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
