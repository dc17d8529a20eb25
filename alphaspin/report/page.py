"""One HTML page about a run: what was done, how it went, and what deserves a second look.

The page holds all it needs (style, plots as SVG) and fetches nothing, so it can be mailed, archived
and opened offline. It is a function of the run folder alone: the same run gives the same bytes.
Nothing here needs torch, so that a report is quick to write afresh.
"""

import base64
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel, ValidationError

from alphaspin.config import Config
from alphaspin.data.answers import checked_part
from alphaspin.errors import InputError
from alphaspin.evaluation.paired import AGAINST_BASE, Difference, Paired, difference
from alphaspin.evaluation.record import Measures
from alphaspin.foundation import console
from alphaspin.foundation.artefacts import (
    MANIFEST,
    read_manifest,
    read_record,
    stands,
    write_atomically,
)
from alphaspin.foundation.paths import for_others, published, refuse_links
from alphaspin.foundation.runs import LOST, Metrics
from alphaspin.foundation.section import RECORDED, refusals
from alphaspin.report.plots import POINTS, Steps, key, plot_iterates, plot_steps, radar
from alphaspin.report.verdict import Facts, signed, verdict

M = TypeVar("M", bound=BaseModel)
AT_THE_END = "a run writes it when it ends: the command that started the run goes on with it"

COLUMNS = [
    ("nll", "NLL per answer", "%.3f", 1),
    ("sampled", "sampled %", "%.1f", 100),
    ("greedy", "greedy %", "%.1f", 100),
    ("margin", "margin", "%+.3f", 1),
    ("preferred", "preferred to base %", "%.1f", 100),
    ("judged", "judged better than base %", "%.1f", 100),
    ("kl", "KL to base", "%.3f", 1),
    ("length", "tokens", "%.1f", 1),
]
"""The table by iteration: measure, title, form, factor."""


UNSEEN = str.maketrans(
    {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"}
    | {0x7F: "\u2421"}
    | {c: "\ufffd" for c in range(0x80, 0xA0)}
)
"""Control characters, which HTML forbids and models do write, to symbols one can see."""


class Sample(BaseModel):
    """A held-out prompt, its demonstration, and what each policy answered."""

    origin: str
    prompt: str | None = None
    demonstration: str | None = None
    answers: dict[str, str]
    became: str | None = None


class Comparison(BaseModel):
    """What one `alphaspin evaluate` found on held-out prompts; see `compare`."""

    heldout: str
    prompts: int
    judge: str
    rows: list[Measures]


class Summary(BaseModel):
    """`summary.json`, as `job.summarise` makes it."""

    name: str
    config: Config
    environment: dict[str, str]
    adapters: dict[str, str]
    rows: list[Measures]
    paired: Paired | None = None
    pairs: list[dict[str, float]] = []
    became: dict[str, int] = {}
    seconds: dict[str, float]
    trained_tokens: dict[str, int] = {}
    alarms: list[str]
    notes: list[str]
    samples: list[Sample]


def write(folder: Path) -> Path:
    """Write `report.html` into a run folder, as a whole; returns its path.

    Raises:
        InputError: the folder or its `summary.json` is missing, unreadable or another's.
    """
    summary, records = read(folder)
    steps = training_steps(records)
    alarms, marks = find_alarms(summary, records)
    equal = equal_pairs(summary, steps)
    rows, known = summary.rows, summary.paired
    if known and any(len(matrix) != len(rows) for matrix in known.covariance.values()):
        raise InputError(f"{folder / 'summary.json'}: paired: is not of these rows")
    parts = {
        "s": summary,
        "verdict": verdict(Facts(rows, known, equal, summary.config)),
        "columns": [c for c in COLUMNS if any(getattr(row, c[0]) is not None for row in rows)],
        "all_columns": COLUMNS,
        "against_base": AGAINST_BASE,
        "equal": {str(t): share for t, share in equal.items()},
        "apart": differences(rows, known),
        "signed": signed,
        "changed": changed,
        "deed": describe(summary.config),
        "alarms": alarms,
        "steps": sum(map(len, steps.values())),
        "points": POINTS,
        "by_iteration": partial(plot_iterates, summary.rows),
        "comparisons": read_comparisons(folder),
        "plot": partial(partial, plot_iterates),
        "tasks": read_tasks(folder),
        "by_step": partial(plot_steps, steps, marks),
        "matches": partial(matches, summary.config.evaluate.answer),
        "duration": duration,
        "published": published,
        "recipe": yaml.safe_dump(summary.config.recipe(), sort_keys=False, allow_unicode=True),
    }
    path = folder / "report.html"
    write_atomically(path, render("report.html.jinja", parts))
    return path


def render(template: str, parts: Mapping[str, Any]) -> str:
    """A page of this package."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names, prompts and answers are anybody's text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(UNSEEN) if isinstance(value, str) else value,
    )
    script = Markup((Path(__file__).parent / "search.js").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters |= {"key": key, "code": code}
    return environment.get_template(template).render(parts, script=script, digest=digest)


def code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def read(folder: Path) -> tuple[Summary, list[dict[str, Any]]]:
    """The summary and the records of a run folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    refuse_links(folder)
    path, metrics = folder / "summary.json", Metrics(folder / "metrics.jsonl")
    manifest = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    record = read_record(path, AT_THE_END)
    if record.get("of") and not manifest:
        raise InputError(f"{folder / MANIFEST}: missing; restore it")
    summary = _valid(Summary, path, record)
    gone = metrics.lost(manifest or {"adapters": {} if metrics.read() else summary.adapters})
    if gone and (told := LOST.format(", ".join(gone))) not in summary.alarms:
        summary = summary.model_copy(update={"alarms": [told, *summary.alarms]})
    return summary, metrics.read(but=gone)


def _valid(kind: type[M], path: Path, values: Mapping[str, Any]) -> M:
    """Values of a file, checked."""
    try:
        return kind.model_validate(values, context=RECORDED)
    except ValidationError as error:
        told = refusals(error.errors(), lambda item: ".".join(map(str, item["loc"])) or "content")
        raise InputError(f"{path}: {next(told)[1]}") from None


def in_order(names: Iterable[str]) -> list[str]:
    """Base, iterates, control, each by iteration."""
    return sorted(
        names,
        key=lambda name: (
            " " in name,
            name != "base",
            int(name.split()[-1]) if name != "base" else 0,
        ),
    )


def _whole(place: Path) -> dict[str, Path]:
    """The artefacts in a folder, by name."""
    parts = (path for path in place.iterdir() if path.is_dir())
    return {path.name: path for path in parts if stands(path, otherwise="left out")}


def read_comparisons(folder: Path) -> list[Comparison]:
    """All comparisons on held-out prompts in RUN/evaluation."""
    found: list[Comparison] = []
    for place in sorted((folder / "evaluation").glob("heldout-*")):
        with _as_written(place):
            parts = _whole(place)
            rows = [_json(parts[name] / "evaluation.json") for name in in_order(parts)]
            if rows and (about := read_about(place)):
                found.append(_valid(Comparison, place / "about.json", {**about, "rows": rows}))
    return found


@contextlib.contextmanager
def _as_written(place: Path) -> Generator[None]:
    """For content of a run folder, which may be anybody's."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{place}: not as alphaspin writes it ({said}); move it away") from None


def read_about(place: Path) -> dict[str, Any] | None:
    """What a comparison says of itself, or None; why is said."""
    try:
        return read_record(place / "about.json", "`alphaspin evaluate` writes it again")
    except InputError as error:
        console.note(f"{place} is left out: {error}")
        return None


class Tasks(NamedTuple):
    """What policies did on one benchmark: rows [task, metric, a value of each policy], notes, and
    radar charts with their titles."""

    title: str
    names: list[str]
    rows: list[list[str]]
    notes: list[str]
    charts: list[tuple[str, Markup]]
    curves: list[tuple[str, str, str]]


def read_tasks(folder: Path) -> list[Tasks]:
    """The benchmarks in RUN/evaluation."""
    found: list[Tasks] = []
    for place in sorted((folder / "evaluation").glob("*-*")):
        if place.name.startswith(("heldout-", "answers-")):
            continue
        with _as_written(place):
            parts = _whole(place)
            results = {name: _json(parts[name] / "results.json") for name in in_order(parts)}
            for first in [*results.values()][:1]:
                title = first.get("title") or (  # of earlier versions
                    f"lm-evaluation-harness {first['harness']}" + ", chat template" * first["chat"]
                )
                curves = [("", name, css_of(name)) for name in results]
                rows, notes = task_rows(results), task_notes(results)
                found.append(Tasks(title, [*results], rows, notes, _charts(results), curves))
    return found


def css_of(name: str) -> str:
    """A policy's CSS classes where policies are curves: the base grey, the control dashed."""
    if name == "base":
        return "h dotted"
    return "abcdefg"[int(name.split()[-1]) % 7] + " dashed" * (" " in name)


def _charts(results: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """A radar chart of each metric that is to have one, with a line for each policy."""
    asked = {
        chart["metric"]: chart for found in results.values() for chart in found.get("radar", ())
    }
    charts: list[tuple[str, Markup]] = []
    for metric, chart in asked.items():
        lines: dict[str, list[float]] = {}
        axes: list[str] = [*results.values()][-1]["axes"]
        for name, found in results.items():
            values = [found["results"].get(axis, {}).get(metric) for axis in axes]
            if None not in values:
                lines[css_of(name)] = values
        if lines and len(axes) > 2:
            charts.append((chart["title"], radar(chart["title"], axes, chart["high"], lines)))
    return charts


def task_notes(results: Mapping[str, Any]) -> list[str]:
    """What is to be said beside the numbers, of whom."""
    said: dict[str, list[str]] = {}
    for name, found in results.items():
        for note in found.get("notes", ()):
            said.setdefault(note, []).append(name)
    every = len(results)
    return [note if len(of) == every else f"{', '.join(of)}: {note}" for note, of in said.items()]


def task_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows [task, metric, value ± standard error of each policy] of the harness's results."""
    rows: list[list[str]] = []
    tasks = {
        task: values for found in results.values() for task, values in found["results"].items()
    }
    for task, values in tasks.items():
        for entry in values:
            metric, _, filtered = entry.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            cells: list[str] = []
            for found in results.values():
                own = found["results"].get(task, {})
                value, error = own.get(entry), own.get(f"{metric}_stderr,{filtered}")
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                shown = "–" if value is None else shown
                cells.append(f"{shown} ± {error:.2g}" if isinstance(error, float) else shown)
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append([task, name, *cells])
    return rows


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; remove the folder, and evaluate again") from None


def training_steps(records: Sequence[dict[str, Any]]) -> Steps:
    """The finite numbers of self-play training, in order."""
    found: Steps = {}
    for record in records:
        stage = re.fullmatch(r"train/(\d+)", str(record.get("stage")))
        step = record.get("step")
        if stage and isinstance(step, int) and "alarm" not in record:
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
            finite = {k: v for k, v in numbers.items() if math.isfinite(v)}
            found.setdefault(int(stage[1]), {})[step] = finite
    return {t: dict(sorted(found[t].items())) for t in sorted(found)}


def equal_pairs(summary: Summary, steps: Steps) -> dict[int, float]:
    """Iteration → share of the pairs that teach nothing, as their answers are equal or tie.

    Of losses that learn from such pairs too, nothing is known.
    """
    if summary.config.preference.judged:
        return {
            int(one["iteration"]): one["ties"] / one["prompts"]
            for one in summary.pairs
            if one.get("prompts")
        }
    config = summary.config
    if config.method == "spin" and not config.loss.ignores_equal_pairs():
        return {}
    taught = {
        t: [values["pairs/informative"] for values in of.values() if "pairs/informative" in values]
        for t, of in steps.items()
    }
    return {t: 1 - float(np.mean(shares)) for t, shares in taught.items() if shares}


def differences(
    rows: Sequence[Measures], known: Paired | None
) -> list[tuple[str, str, list[Difference | None]]]:
    """Each iterate beside the base, the control and the iterate before, by `COLUMNS`."""
    names = {row.name: k for k, row in enumerate(rows)}
    found: list[tuple[str, str, list[Difference | None]]] = []
    for row in rows if known else []:
        t = row.iteration
        others = ["base"] if row.control else ["base", str(t - 1) * (t > 0), f"sft {t}"]
        for other in others if row.name != "base" else []:
            if other in names:
                pair = names[row.name], names[other]
                values = [
                    difference(rows, known, m, *pair) if known and m in known.covariance else None
                    for m, *_ in COLUMNS
                ]
                found.append((row.name, other, values))
    return found


def changed(answer: str, base: str) -> Markup:
    """An answer, with the words that the base's does not have, and those it had, marked."""
    before, after = (re.findall(r"\s+|\S+", text) for text in (base, answer))
    parts: list[Markup] = []
    for kind, i, j, k, n in SequenceMatcher(None, before, after).get_opcodes():
        old, new = (escape("".join(words)) for words in (before[i:j], after[k:n]))
        if kind == "equal":
            parts.append(new)
            continue
        parts += [Markup("<del>{}</del>").format(old)] * bool(old.strip())
        parts.append(Markup("<ins>{}</ins>").format(new) if new.strip() else new)
    return Markup("").join(parts)


def find_alarms(
    summary: Summary, records: Sequence[dict[str, Any]]
) -> tuple[list[str], list[tuple[int, int]]]:
    """All alarms as text, and (iteration, step) of those that came up in training."""
    texts: list[str] = []
    marks: list[tuple[int, int]] = []
    known: set[str] = set()
    for record in (record for record in records if "alarm" in record):
        stage, step = str(record.get("stage")), record.get("step")
        known.add(f"{stage}: {record['alarm']}")
        texts.append(f"{stage}, step {step}: {record['alarm']}")
        number = stage.removeprefix("train/")
        if number.isdecimal() and isinstance(step, int):
            marks.append((int(number), step))
    return texts + [text for text in summary.alarms if text not in known], marks


def describe(config: Config) -> str:
    """What was done, in one sentence."""
    config = for_others(config)
    lora = config.lora
    parts = [
        *config.preference.deed(config, config.model),
        f"judge {config.judge.title()}" if config.preference.judged else "",
        f"{'rsLoRA' if lora.use_rslora else 'LoRA'} of rank {lora.r} with alpha {lora.alpha:g}"
        + (f", going on from {lora.start}, which belongs to the base" if lora.start else ""),
        "plain further SFT at equal cost as control" if config.control == "sft" else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def matches(pattern: str | None, answer: str, demonstration: str | None) -> bool:
    """Exact match, as the evaluation counts it."""
    part = checked_part(pattern)
    same = demonstration is not None and part(answer) == part(demonstration)
    return same and part(answer) is not None


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
