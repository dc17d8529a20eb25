"""Every figure in README and docs is in a result that its section links to."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?"
FIGURE = re.compile(rf"(?<![\w.,-])[-+]?({NUMBER})(?:\*\*)?(?: ± ({NUMBER}))?(?![\w,.]*\d)(?!-bit)")
UNIT = re.compile(r" (?:MiB|ms|µs|s|tokens/s|nats|×)\b")
NO_FIGURE = re.compile(
    r"^```.*?^```|`[^`]*`|(?<=\])\([^)]*\)|\[\d{4}\.\d{5}\]|\d{4}-\d\d-\d\d"
    r"|(?i:python|torch|transformers|triton|trl|numpy|xeon|capability)"
    r" (?:\d[\d.]*(?:, | and | to )?)+",
    re.MULTILINE | re.DOTALL,
)
"""Code, links, papers, dates and versions."""

GIVEN = {
    "README.md": "0.1 6,000",  # B parameters: for whom it is; demonstrations
    "docs/kernels.md": "1.16",  # TRL
    "docs/findings.md": ".95 6,000 12,288",  # α; demonstrations
    "benchmarks/self-play.md": "0.4 0.5 .5 .75 1.5 .95 .8 6,000",  # β, α, factors in theory, a goal
}
"""Numbers that nobody measured: settings, and what theory says (docs/theory.md, section 1)."""


def result(name: str) -> Any:
    """The raw numbers of a result."""
    (path,) = RESULTS.glob(f"*/{name}.json")
    return json.loads(path.read_text())["raw"]


def shown(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{mean(values):.6f} ± {stdev(values) / len(values) ** 0.5:.6f}"


def computed() -> dict[str, Iterator[str] | list[str]]:
    """What pages compute from results, by page."""
    trl = result("trl")
    saved = (
        f"{trl[k + ' + patch_trl']['MiB'] / one['MiB']:.6f}"
        for k, one in trl.items()
        if k.endswith("TRL")
    )
    rows = {
        (run["label"], run["seed"], row["name"]): row["nll"]
        for run in result("successors-tiny")
        for row in run["rows"]
    }
    ahead = (
        shown([rows["SPIN", seed, t] - rows["SPACE", seed, t] for seed in range(3)]) for t in "45"
    )
    drift = [run["after"]["kl"] for run in result("last-iteration")[0]]
    return {
        "docs/kernels.md": saved,
        "docs/findings.md": ahead,
        "benchmarks/self-play.md": [shown(drift[:3])],
    }


def figures(text: str) -> Iterator[tuple[str, str | None]]:
    """(number, its error or None) of a text; whole numbers where they are measured in a unit."""
    lines = NO_FIGURE.sub(" ", text).replace("\N{MINUS SIGN}", "-")
    for found in FIGURE.finditer(lines):
        whole = not re.search(r"[.,]", found[1]) and found[2] is None
        if not whole or UNIT.match(lines, found.end()):
            yield found[1], found[2]


def rounds(wanted: str, number: float) -> bool:
    """Whether a number may be written so: to as many digits, or 78,000 for 78,092."""
    digits = wanted.replace(",", "")
    _, point, decimals = digits.partition(".")
    zeros = len(digits) - len(digits.rstrip("0")) if "," in wanted and not point else 0
    unit = 10.0 ** (zeros if not point else -len(decimals))
    return abs(abs(number) - float(digits)) <= unit * 0.5001


def strange(text: str, known: str) -> list[str]:
    """Figures of a text that another does not have; seconds may be its milliseconds."""
    have = [
        (float(number.replace(",", "")), error and float(error.replace(",", "")))
        for number, error in FIGURE.findall(known.replace("**", ""))
    ]
    return [
        f"{number} ± {error}" if error else number
        for number, error in figures(text)
        if not any(
            (rounds(number, one) or (not error and one > 100 and rounds(number, one / 1000)))
            and (not error or (bool(se) and rounds(error, float(se))))
            for one, se in have
        )
    ]


def sections(page: str) -> Iterator[tuple[str, str]]:
    """(its text, what the results have that it links to) of each section and of the first."""
    head, *parts = re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)
    for part in (head, *parts):
        links = re.findall(r"\]\(([^)#]*results/[^)]*\.md)\)", part + head)
        yield part, "\n".join(((ROOT / page).parent / link).read_text() for link in links)


@pytest.mark.parametrize("page", GIVEN)
def test_figures_are_those_of_the_results(page: str) -> None:
    extra = " ".join([GIVEN[page], *computed().get(page, [])])
    for text, known in sections(page):
        heading = text.partition("\n")[0]
        assert not strange(text, f"{known} {extra}"), f"{page}, {heading}: not in what it links to"


def test_a_wrong_figure_is_found() -> None:
    known = "| 0.582 | 58.6 ± 1.3 | 407.6 | 77,283 |"
    right = "`9.9` is **.58** or 58.6 ± 1.3; 0.41 s, 77,000 and 77,280 tokens, 408 ms"
    assert not strange(right, known)
    wrong = ["58.6 ± 1.0", "58.4 ± 1.3", "0.42", "0.583", "78,000", "409", "3.1"]
    assert strange("; ".join(wrong).replace("409", "409 ms"), known) == wrong
