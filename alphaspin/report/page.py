"""One HTML page about a run: what was done, how it went, and what deserves a second look.

The page holds all it needs (style, plots as SVG) and fetches nothing, so it can be mailed, archived
and opened offline. It is a function of the run folder alone: the same run gives the same bytes.
Nothing here needs torch, so that a report is quick to write afresh.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel, ValidationError

from alphaspin.config import Config
from alphaspin.data.answers import checked_part
from alphaspin.errors import InputError
from alphaspin.evaluation.paired import AGAINST_BASE, Difference, Paired, difference
from alphaspin.evaluation.record import Measures
from alphaspin.foundation.artefacts import MANIFEST, read_manifest, run_id, stands, write_atomically
from alphaspin.foundation.paths import for_others, published, refuse_links
from alphaspin.foundation.runs import Metrics
from alphaspin.foundation.section import RECORDED, refusals
from alphaspin.report.verdict import Facts, signed, verdict

COLOURS = {"ink": "#010101", "grid": "#020202", "page": "#030303", "alarm": "#050505"} | {
    name: f"#{number:02x}0101" for number, name in enumerate("abcdefgh", start=16)
}
"""Stand-ins that the plots are drawn with. In the SVG they become CSS variables, so that the page's
light, dark and print colours apply."""

MARKERS = {
    letter: (sides, kind, angle)
    for letter, sides, kind, angle in [
        ("a", 24, 0, 0),
        ("b", 4, 0, 45),
        ("c", 3, 0, 0),
        ("d", 4, 0, 0),
        ("e", 3, 0, 180),
        ("f", 5, 1, 0),
        ("g", 4, 1, 45),
        ("h", 3, 0, 90),
    ]
}
"""Markers by CSS class, which tell curves apart where colours do not: sides of a polygon (0) or
star (1), and its angle. Those of a control are hollow."""

DASHES = {"dashed": (5, 2.5), "dotted": (1.2, 2), "dashdot": (7, 2, 1.2, 2)}
"""Lines by CSS class, in widths of the line; others are solid."""

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

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "font.size": 9,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["grid"],
    "xtick.bottom": False,
    "ytick.left": False,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
}

POINTS = 300
"""Points of a curve, over all iterations; longer curves are drawn as the mean and range of bins."""

SHARES = ("sampled", "greedy", "preferred", "judged", "controlled")
"""Measures that are shown in per cent."""

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
    run: str | None = None
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


Steps = dict[int, dict[int, dict[str, float]]]
"""Iteration → step → metric → value."""

Curves = Sequence[tuple[str, str, str]]
"""Lines of a plot: name of a metric or measure, label, CSS classes (`a` to `h`, `dashed`)."""


def write(folder: Path) -> Path:
    """Write `report.html` into a run folder, as a whole; returns its path.

    Raises:
        InputError: the folder, its `summary.json` or its `metrics.jsonl` is missing or unreadable.
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
    path = folder / "summary.json"
    try:
        if not path.exists():
            raise InputError(
                f"{path}: missing; a run writes it when it ends: the command that started the run "
                "goes on with it"
            )
        known = json.loads(path.read_text(encoding="utf-8"))
        summary = Summary.model_validate(known, context=RECORDED)
        path = folder / "metrics.jsonl"
        if not path.exists():
            raise InputError(f"{path}: missing")
        manifest = folder / MANIFEST
        if manifest.exists() and summary.run not in (None, run_id(read_manifest(manifest))):
            raise InputError(
                f"{folder / 'summary.json'}: is of another run than {MANIFEST}; the command that "
                "made this run writes its own"
            )
        return summary, Metrics(path).read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        told = refusals(error.errors(), lambda item: ".".join(map(str, item["loc"])) or "content")
        raise InputError(f"{path}: {next(told)[1]}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


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
        parts = _whole(place)
        rows = [_json(parts[name] / "evaluation.json") for name in in_order(parts)]
        if rows:
            about = _json(place / "about.json")
            found.append(Comparison.model_validate({**about, "rows": rows}))
    return found


def read_tasks(folder: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, policies and rows of each set of harness tasks in RUN/evaluation."""
    found: list[tuple[str, list[str], list[list[str]]]] = []
    for place in sorted((folder / "evaluation").glob("tasks-*")):
        parts = _whole(place)
        results = {name: _json(parts[name] / "results.json") for name in in_order(parts)}
        for first in [*results.values()][:1]:
            title = f"lm-evaluation-harness {first['harness']}" + ", chat template" * first["chat"]
            found.append((title, list(results), task_rows(results)))
    return found


def task_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows [task, metric, value ± standard error of each policy] of the harness's results."""
    rows: list[list[str]] = []
    tasks = {
        task: values for found in results.values() for task, values in found["results"].items()
    }
    for task, values in tasks.items():
        for key in values:
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            cells: list[str] = []
            for found in results.values():
                own = found["results"].get(task, {})
                value, error = own.get(key), own.get(f"{metric}_stderr,{filtered}")
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
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
        f"LoRA of rank {lora.r} with alpha {lora.alpha:g}",
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


def plot_iterates(rows: Sequence[Measures], title: str, curves: Curves) -> Markup:
    """Measures of base, iterates and (dashed) control, with bars of one standard error, or of the
    confidence interval where there is one."""

    def bar(row: Measures, measure: str) -> tuple[float, float]:
        """Lengths of the bar below and above the value; NaN for none."""
        value, low = getattr(row, measure), getattr(row, f"{measure}_low", None)
        if low is not None:
            return value - low, getattr(row, f"{measure}_high") - value
        error = getattr(row, f"{measure}_se", None)
        return (math.nan, math.nan) if error is None else (error, error)

    def paint(axes: Axes) -> None:
        for number, (measure, _, css) in enumerate(curves):
            # The control starts from the base too.
            line = [r for r in rows if r.control == ("dashed" in css) or r.name == "base"]
            scale = 100 if measure in SHARES else 1
            shift = 0.04 * (number - (len(curves) - 1) / 2)  # keeps bars from covering each other
            axes.errorbar(
                [row.iteration + shift for row in line],
                [scale * getattr(row, measure) for row in line],
                scale * np.array([bar(row, measure) for row in line]).T,
                capsize=2,
                **look(css),
            )
        if all(measure in SHARES for measure, _, _ in curves):
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -2), max(high, 5))  # no closer look than this at 0 %
        by_iteration(axes)

    return draw(title, paint)


def by_iteration(axes: Axes) -> None:
    """Label an axis of iterations, with the base at -1."""
    axes.set_xlabel("iteration t")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: "base" if x == -1 else f"{x:.0f}")


def plot_steps(
    steps: Steps, marks: Sequence[tuple[int, int]], title: str, curves: Curves
) -> Markup:
    """Metrics over the steps of all iterations, one after the other."""
    lengths = {t: max(steps[t]) for t in steps}
    starts = {t: sum(lengths[k] for k in steps if k < t) for t in steps}
    bins = max(2, POINTS // len(steps))
    total = sum(lengths.values())
    named: list[int] = []  # where there is room for it
    for t in steps:
        last = starts[named[-1]] if named else -total
        if starts[t] - last >= total / 8 and starts[t] <= 0.9 * total:
            named.append(t)

    def paint(axes: Axes) -> None:
        for t, start in starts.items():
            if start:
                axes.axvline(start + 0.5, color=COLOURS["ink"], lw=0.5, alpha=0.5)
            if t in named:
                axes.text(
                    start + 0.5, 1.01, f" t = {t}", fontsize=8, transform=axes.get_xaxis_transform()
                )
            for metric, _, css in curves:
                points = [(start + s, v[metric]) for s, v in steps[t].items() if metric in v]
                parts = np.array_split(np.array(points), min(len(points), bins)) if points else []
                x = [part[:, 0].mean() for part in parts]
                every = max(1, len(parts) // 15)
                y = [part[:, 1].mean() for part in parts]
                style = look(css)
                if len(curves) < 2 and len(points) >= 20:
                    style["marker"] = ""
                axes.plot(x, y, markevery=every, **style)
                if len(points) > bins:
                    low, high = ([f(part[:, 1]) for part in parts] for f in (np.min, np.max))
                    # The edge has a width so that a single outlier is seen.
                    axes.fill_between(x, low, high, color=COLOURS[css[0]], alpha=0.25, lw=0.7)
        for t, step in marks:
            if t in starts:
                axes.axvline(starts[t] + step, color=COLOURS["alarm"], lw=0.9, linestyle=":")
        axes.set_xlabel("optimiser step")
        axes.set_xlim(0.5, total + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return draw(title, paint)


def look(css: str) -> dict[str, Any]:
    """CSS classes of a curve as arguments of matplotlib."""
    letter, *kinds = css.split()
    colour, hollow = COLOURS[letter], "dashed" in kinds
    return {
        "color": colour,
        "linestyle": (0, DASHES[kinds[-1]]) if kinds else "-",
        "marker": MARKERS[letter],
        "markerfacecolor": COLOURS["page"] if hollow else colour,
        "markeredgewidth": 0.9,
    }


def key(css: str) -> Markup:
    """A curve's line and marker, for legends."""
    letter, *kinds = css.split()
    mark = MarkerStyle(MARKERS[letter])
    path = mark.get_path().transformed(mark.get_transform())
    points = np.array(path.vertices) * (6.5, -6.5) + (16, 6)
    return Markup(
        '<svg class="key" viewBox="0 0 32 12" aria-hidden="true" stroke="var(--{0})">'
        '<path d="M0 6H32" stroke-width="1.7" stroke-dasharray="{1}"/>'
        '<polygon points="{2}" fill="var(--{3})" stroke-width="1.2"/></svg>'
    ).format(
        letter,
        " ".join(f"{1.7 * dash:.3g}" for dash in DASHES[kinds[-1]]) if kinds else "none",
        " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        "page" if "dashed" in kinds else letter,
    )


def tick(y: float) -> str:
    """A number on an axis, for which there is room for seven characters."""
    text = f"{y:g}"
    if len(text) > 7:
        digits, _, power = f"{y:.2e}".partition("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return text.replace("-", "\u2212")


def draw(title: str, paint: Callable[[Axes], None]) -> Markup:
    """Axes as an SVG element that takes its width, font and colours from the page."""
    salt = {"svg.hashsalt": title}  # ids are random without it, and equal in all plots with one
    with matplotlib.style.context(["default", STYLE, salt]):
        figure = Figure(figsize=(4.4, 2.5))
        figure.patch.set_visible(False)
        axes = figure.add_axes((0.145, 0.17, 0.845, 0.75))
        axes.patch.set_visible(False)
        axes.yaxis.set_major_formatter(lambda y, _: tick(y))
        paint(axes)
        text = StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    head = Markup('<svg {} role="img" aria-label="{}">').format(Markup(view[0]), title)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    body = body[body.index(">", body.index("<svg")) + 1 :]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nothing refers to them
    body = re.sub(r"font-family: [^;\"]*; ", "", body)
    body = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return head + Markup(body)
