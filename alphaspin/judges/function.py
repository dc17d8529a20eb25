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
    grades: str | None = None
    """`package.module:function` that grades `first` of a `Comparison` from 1 to 10, for benchmarks
    that want grades; `second` is empty."""

    @model_validator(mode="before")
    @classmethod
    def _remembered(cls, values: Any) -> Any:
        return values if values.get("folder") else {**values, "folder": os.getcwd()}

    free = frozenset({"folder", "grades"})

    def load(self, pattern: str | None) -> Judge:
        """Import it."""
        del pattern
        return FunctionJudge(*self._found("function"), both_orders=self.both_orders)

    def counting(self, pattern: str | None) -> tuple[Judge, Judge | None]:
        """With the function that grades, where there is one."""
        judge = self.load(pattern)
        if self.grades is None:
            return judge, None
        found = self._found("grades")
        return judge, FunctionJudge(*found, both_orders=False, bounds=(1, 10))

    def _found(self, key: str) -> tuple[Callable[..., float], str]:
        """The function that a setting names, and its identity."""
        name: str = getattr(self, key)
        try:
            found, digest = load_object(name, str(self.folder))
        except InputError as error:
            raise InputError(f"judge.{key} = {name}: {error}") from error
        if not callable(found):
            raise InputError(f"judge.{key} = {name}: is not a function")
        return cast("Callable[..., float]", found), f"callable:{name}@{digest[:16]}"

    def title(self) -> str:
        """With the function."""
        return f"callable {self.function}"
