"""One HTML page about several runs: which setting ends where, beyond the luck of a seed.

Runs that differ in their seed alone are one curve, the mean over seeds with its standard error.
The control of a run is a curve of its own. A function of the run folders alone, as `report`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import NDArray

from alphaspin.errors import InputError
from alphaspin.evaluation.record import Measures
from alphaspin.foundation.artefacts import write_atomically
from alphaspin.foundation.paths import for_others
from alphaspin.foundation.section import flat
from alphaspin.report.page import Summary, duration, read, render
from alphaspin.report.plots import SHARES, Curves, by_iteration, draw, look

MEASURES = {
    "nll": "NLL of the demonstrations, nats per answer",
    "sampled": "Sampled answers that match, %",
    "greedy": "Greedy answers that match, %",
    "judged": "Judge's win rate against the base, %",
    "kl": "KL to the base, nats per answer",
}
"""Measures that the page shows where all runs have them, and their titles."""

LETTERS = "abcdefgh"
"""CSS classes of the curves, which set their colours."""


@dataclass
class Setting:
    """Runs of one setting: self-play, or its control.

    label: what tells it from the others. seeds: of the runs. rows: by run, base and iterates.
    """

    label: str
    control: bool
    seeds: list[int] = field(default_factory=list)
    rows: list[list[Measures]] = field(default_factory=list)

    def values(self, measure: str) -> NDArray[np.float64]:
        """[runs, 1 + iterations]: the base, then t = 0, 1, …; shares in per cent."""
        scale = 100 if measure in SHARES else 1
        found = [[getattr(row, measure) for row in rows] for rows in self.rows]
        return scale * np.array(found, dtype=np.float64)  # NaN where there is none

    def mean(self, measure: str) -> NDArray[np.float64]:
        """[1 + iterations]: over runs."""
        return self.values(measure).mean(0)

    def error(self, measure: str) -> NDArray[np.float64]:
        """[1 + iterations]: standard error over runs; of a single run, over prompts, or NaN."""
        if len(self.rows) > 1:
            return self.values(measure).std(0, ddof=1) / math.sqrt(len(self.rows))
        scale = 100 if measure in SHARES else 1
        errors = [getattr(row, f"{measure}_se", None) for row in self.rows[0]]
        return np.array([math.nan if error is None else scale * error for error in errors])


def settings(summaries: Sequence[Summary]) -> list[Setting]:
    """The runs by setting, in the order of their first runs, the control after its own.

    Raises:
        InputError: a run has no evaluations, or two runs are of one setting and one seed.
    """
    described = [flat(summary.config.identity() | {"seed": 0}) for summary in summaries]
    found: dict[str, dict[bool, Setting]] = {}
    for summary, about in zip(summaries, described, strict=True):
        if not summary.rows:
            raise InputError(f"{summary.name}: was not evaluated, there is nothing to compare")
        namesakes = [d for s, d in zip(summaries, described, strict=True) if s.name == summary.name]
        names = flat(for_others(summary.config).identity())
        label = ", ".join([summary.name, *_differences(about, namesakes, names)])
        group = found.setdefault(json.dumps(about, sort_keys=True), {})
        for control in (False, True):
            rows = [r for r in summary.rows if r.control == control and r.name != "base"]
            if rows:
                setting = group.setdefault(
                    control, Setting(label + ", SFT control" * control, control)
                )
                if summary.config.seed in setting.seeds:
                    raise InputError(
                        f"{summary.name}: two runs with the same settings and seed "
                        f"{summary.config.seed}"
                    )
                setting.seeds.append(summary.config.seed)
                setting.rows.append([summary.rows[0], *sorted(rows, key=lambda r: r.iteration)])
    return [group[kind] for group in found.values() for kind in sorted(group)]


def write(folders: Sequence[Path], page: Path) -> Path:
    """Write the page about some finished runs, as a whole; returns its path.

    Raises:
        InputError: as `report.read` and `settings`.
    """
    summaries = [read(folder)[0] for folder in folders]
    found = settings(summaries)
    shown = [
        measure
        for measure in MEASURES
        if all(np.isfinite(setting.values(measure)[:, 1:]).all() for setting in found)
    ]
    panels = [
        (MEASURES[m], [(m, s.label, style(found, k)) for k, s in enumerate(found)]) for m in shown
    ]
    parts = {
        "title": page.stem,
        "settings": found,
        "length": max(len(setting.rows[0]) for setting in found),
        "measures": {measure: MEASURES[measure] for measure in shown},
        "css": {s.label: style(found, k) for k, s in enumerate(found)},
        "plot": partial(plot, found),
        "panels": panels,
        "duration": duration,
        "runs": [
            (folder.absolute().name, s.name, s.config.seed, sum(s.seconds.values()), s.alarms)
            for folder, s in zip(folders, summaries, strict=True)
        ],
    }
    write_atomically(page, render("overview.html.jinja", parts))
    return page


def style(found: Sequence[Setting], number: int) -> str:
    """CSS classes of a setting: colour and marker, of which there are eight, then other lines.

    A control has those of its self-play, which it stands behind, dashed and hollow.
    """
    setting = found[number]
    group = sum(not one.control for one in found[: number + 1]) - 1
    letter, line = LETTERS[group % len(LETTERS)], group // len(LETTERS)
    kinds = ["dashed"] * setting.control + [("", "dotted", "dashdot")[line % 3]]
    return " ".join([letter, *filter(None, kinds)])


def plot(found: Sequence[Setting], title: str, curves: Curves) -> Markup:
    """A measure by iteration, a curve per setting, with bars of one standard error."""

    def paint(axes: Axes) -> None:
        for number, (setting, (measure, _, css)) in enumerate(zip(found, curves, strict=True)):
            mean, error = setting.mean(measure), setting.error(measure)
            # Keeps bars from covering each other.
            shift = min(0.03, 0.3 / len(curves)) * (number - (len(curves) - 1) / 2)
            axes.errorbar(
                np.arange(-1, len(mean) - 1) + shift,
                mean,
                error,
                capsize=1.5,
                **look(css),
            )
        by_iteration(axes)

    return draw(title, paint)


def _differences(
    about: dict[str, Any], others: Sequence[dict[str, Any]], names: dict[str, Any]
) -> list[str]:
    """The settings in which `about` differs from one of the others, as `names` has them."""

    def shown(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    return [
        f"{key} = {shown(names.get(key))}"
        for key, value in about.items()
        if any(other.get(key) != value for other in others)
    ]
