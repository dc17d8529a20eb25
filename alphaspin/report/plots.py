"""Plots as SVG whose colours are the page's: of measures by iteration, of metrics by step."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import MaxNLocator

from alphaspin.evaluation.record import Measures

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


Steps = dict[int, dict[int, dict[str, float]]]
"""Iteration → step → metric → value."""


Curves = Sequence[tuple[str, str, str]]
"""Lines of a plot: name of a metric or measure, label, CSS classes (`a` to `h`, `dashed`)."""


def plot_iterates(rows: Sequence[Measures], title: str, curves: Curves) -> Markup:
    """Measures of base, iterates and (dashed) control, with bars of one standard error, or of the
    confidence interval where there is one."""

    def of(row: Measures, measure: str) -> float:
        """A number; NaN for none."""
        found = getattr(row, measure, None)
        return math.nan if found is None else found

    def bar(row: Measures, measure: str) -> tuple[float, float]:
        """Lengths of the bar below and above the value; NaN for none."""
        value, low, high = (of(row, measure + end) for end in ("", "_low", "_high"))
        error = of(row, f"{measure}_se")
        return (error, error) if math.isnan(low) else (value - low, high - value)

    def paint(axes: Axes) -> None:
        for number, (measure, _, css) in enumerate(curves):
            # The control starts from the base too.
            line = [r for r in rows if r.control == ("dashed" in css) or r.name == "base"]
            scale = 100 if measure in SHARES else 1
            shift = 0.04 * (number - (len(curves) - 1) / 2)  # keeps bars from covering each other
            axes.errorbar(
                [row.iteration + shift for row in line],
                [scale * of(row, measure) for row in line],
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


def radar(
    title: str, names: Sequence[str], high: float, lines: Mapping[str, list[float]]
) -> Markup:
    """Values from 0 to `high` on spokes, a closed line for each of some CSS classes."""

    def paint(axes: Axes) -> None:
        angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
        polar: Any = axes
        polar.set_theta_offset(np.pi / 2)
        polar.set_theta_direction(-1)
        for css, values in lines.items():
            axes.plot([*angles, 0], [*values, values[0]], **look(css))
        axes.set_ylim(0, high)
        axes.set_xticks(angles, names)
        for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
            label.set_parse_math(False)  # anybody's text
            side = math.sin(angle)
            label.set_horizontalalignment(
                "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
            )
        axes.xaxis.grid(True)
        axes.yaxis.set_major_locator(MaxNLocator(5))

    return draw(title, paint, polar=True)


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


def draw(title: str, paint: Callable[[Axes], None], *, polar: bool = False) -> Markup:
    """Axes as an SVG element that takes its width, font and colours from the page."""
    salt = {"svg.hashsalt": title}  # ids are random without it, and equal in all plots with one
    with matplotlib.style.context(["default", STYLE, salt]):
        figure = Figure(figsize=(4.4, 3.4 if polar else 2.5))
        figure.patch.set_visible(False)
        place = (0.2, 0.1, 0.6, 0.78) if polar else (0.145, 0.17, 0.845, 0.75)
        axes = figure.add_axes(place, polar=polar)
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
