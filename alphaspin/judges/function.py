"""A Python function as the judge."""

import os
from collections.abc import Callable
from typing import Any, cast

from pydantic import model_validator

from alphaspin.errors import InputError
from alphaspin.foundation.kinds import load_object
from alphaspin.foundation.paths import Place
from alphaspin.judges.base import FunctionJudge, Judge, JudgeConfig


class Function(JudgeConfig):
    """A Python function of a `Comparison`."""

    kind: str = "callable"
    function: str
    """`package.module:function`, found from the working directory too."""
    folder: Place | None = None
    """Folder in which `function` is found: the working directory at the start of the run, which is
    remembered. For a run whose `function` has moved."""
    both_orders: bool = True
    """Asked in both orders; not needed where f(a, b) = 1 - f(b, a)."""

    @model_validator(mode="before")
    @classmethod
    def _remembered(cls, values: Any) -> Any:
        return values if values.get("folder") else {**values, "folder": os.getcwd()}

    def load(self, pattern: str | None) -> Judge:
        """Import it."""
        del pattern
        try:
            found = load_object(self.function, str(self.folder))
        except InputError as error:
            raise InputError(f"judge.function = {self.function}: {error}") from error
        if not callable(found[0]):
            raise InputError(f"judge.function = {self.function}: is not a function")
        identity = f"callable:{self.function}@{found[1][:16]}"
        return FunctionJudge(
            cast("Callable[..., float]", found[0]), identity, both_orders=self.both_orders
        )

    def title(self) -> str:
        """With the function."""
        return f"callable {self.function}"
