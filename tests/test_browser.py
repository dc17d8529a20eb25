"""The report as a browser lays it out: nothing runs out of its place or over anything else.

Needs Debian's `chromium` (or Chrome); skipped where there is none.
"""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import STEPS, make_run, step, summary

from alphaspin.report import overview
from alphaspin.report import page as report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")

CHECK = r"""
const problems = [];
const wide = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > wide)
  problems.push(`the page is ${document.documentElement.scrollWidth} wide in ${wide}`);
document.querySelectorAll("details").forEach((one) => (one.open = true));
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, parent = node.parentElement;
  if (!node.data.trim() || !parent.checkVisibility() || parent.closest("script")) continue;
  const svg = parent.closest("svg");
  const range = document.createRange();
  range.selectNodeContents(node);
  let clip = null;
  for (let up = parent; up && !clip; up = up.parentElement)
    if (/auto|scroll|hidden/.test(getComputedStyle(up).overflow)) clip = up;
  if (clip === document.body || clip === document.documentElement) clip = null;
  const frame = clip && clip.getBoundingClientRect();
  if (frame && (frame.left < -1 || frame.right > wide + 1))
    problems.push(`a frame from ${frame.left} to ${frame.right}: ${clip.className}`);
  const cell = parent.closest("td, th, caption, li, p, figcaption, h1, h2, h3");
  for (const box of svg ? [parent.getBoundingClientRect()] : range.getClientRects()) {
    if (box.width < 1) continue;
    const what = node.data.trim().slice(0, 30);
    if (frame && !svg && box.left >= frame.right) continue;  // to be scrolled to
    if (!frame && (box.left < -1 || box.right > wide + 1))
      problems.push(`${what}: from ${box.left} to ${box.right} of ${wide}`);
    const room = (svg || cell)?.getBoundingClientRect();
    if (room && (box.left < room.left - 1 || box.right > room.right + 1))
      problems.push(`${what}: runs out of its ${(svg || cell).tagName}`);
    if (room && svg && (box.top < room.top - 1 || box.bottom > room.bottom + 1))
      problems.push(`${what}: runs out of its plot upwards or downwards`);
    // What has been scrolled out of its frame is not seen; glyphs are smaller than their line.
    const shrink = box.height * 0.15;
    const top = Math.max(box.top + shrink, frame ? frame.top : -1e9);
    const bottom = Math.min(box.bottom - shrink, frame ? frame.bottom : 1e9);
    if (bottom > top) texts.push({ what, top, bottom, left: box.left + 1, right: box.right - 1 });
  }
}
texts.sort((a, b) => a.top - b.top);
texts.forEach((a, i) => {
  for (let k = i + 1; k < texts.length && texts[k].top < a.bottom; k++) {
    const b = texts[k];
    if (b.left < a.right && a.left < b.right) problems.push(`${a.what} | ${b.what}: overlap`);
  }
});
let found = [];
const box = document.querySelector(".search input");
if (box) {
  if (box.closest(".search").hidden) problems.push("the search did not start");
  const tables = [...document.querySelectorAll(".samples table")];
  const shown = () => tables.filter((table) => !table.hidden).length;
  for (const words of ["", "needle", "no such words"]) {
    box.value = words;
    box.dispatchEvent(new Event("input"));
    found.push(shown());
  }
}
const paper = getComputedStyle(document.body).backgroundColor;
const result = { problems, texts: texts.length, found, wide, paper };
parent.document.body.textContent = "RESULT" + JSON.stringify(result) + "END";
"""


def look(page: Path, width: int, dark: bool) -> dict[str, Any]:
    """What `CHECK` finds, in a frame of this width: windows have a least width."""
    text = page.read_text(encoding="utf-8")
    # Only the hash of our script is allowed; here the check's is too.
    text = re.sub(r"script-src [^\"]*", "script-src 'unsafe-inline'", text)
    text = text.replace("</body>", f"<script>{{{CHECK}}}</script></body>")
    inner, host = page.with_name("inner.html"), page.with_name("host.html")
    inner.write_text(text, encoding="utf-8")
    host.write_text(
        f'<body style="margin:0"><iframe src="inner.html" style="width:{width}px; height:900px; '
        'border:0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width + 200},1000"]
    command += [
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={1 - dark}",
    ]
    command += ["--virtual-time-budget=10000", "--dump-dom", host.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"RESULT(.*)END", done.stdout, re.DOTALL)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with everything in it and awkward texts, a bare one, and many settings side by side."""
    place = tmp_path_factory.mktemp("pages")
    long = "supercalifragilistic" * 20
    content = summary(name=f"a name that is long and {long}")
    for k, row in enumerate(content["rows"]):
        errors = {f"{name}_se": 0.0123 for name in ("nll", "margin", "judged", "kl", "length")}
        row.update(errors, kl=123.456 * k, length=1234.5, judged=0.5 + 0.1 * k, entropy=12.0)
        row.update(judged_low=0.4, judged_high=0.9)
    sizes = range(len(content["rows"]))
    covariance = [[0.001 * (1 + (i == k)) for i in sizes] for k in sizes]
    content["paired"] = {
        "prompts": 512,
        "covariance": {m: covariance for m in ("nll", "sampled", "greedy", "judged", "length")},
    }
    content["alarms"], content["notes"] = [long], ["some note"]
    sample = content["samples"][0] | {"origin": f"{long}.jsonl:7"}
    sample["answers"] = {name: f"{long} {name}\n\tx" * 9 for name in sample["answers"]}
    content["samples"] += [sample, *([sample | {"prompt": "needle"}] * 9)]
    make_run(place / "all", content, [*STEPS, *(step(t, 1) for t in range(2, 30))])
    bare = summary(rows=[], samples=[], adapters={}, seconds={}, environment={})
    small = {"rewards/chosen": 0.001, "learning_rate": 0.000125}
    records = [step(0, s, **small, **{"rewards/rejected": -0.003 * s}) for s in range(1, 6)]
    found = [report.write(place / "all"), report.write(make_run(place / "bare", bare, records))]
    runs: list[Path] = []
    for k in range(11):
        one = summary(name="many")
        one["config"]["loss"]["beta"] = [0.1 + k]
        for row in one["rows"]:
            row["nll"] += k
            row["sampled"] = min(1, row["sampled"] * (1 + math.sin(k) / 3))
        runs.append(make_run(place / f"many{k}", one))
    return [*found, overview.write(runs, place / "bare" / "many.html")]


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (800, True), (1280, False)])
def test_no_text_overflows_or_overlaps(pages: list[Path], width: int, dark: bool) -> None:
    for page in pages:
        found = look(page, width, dark)
        assert not found["problems"], "\n".join([str(page), *found["problems"]])
        assert found["wide"] == width and found["texts"] > 20
        assert found["paper"] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
        assert found["found"] == ([11, 9, 0] if page.parent.name == "all" else [])


def test_overlaps_are_found(pages: list[Path], tmp_path: Path) -> None:
    """The check itself: a page that is spoilt."""
    text = pages[0].read_text(encoding="utf-8")
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        text.replace("</style>", "h2 { margin-top: -3rem; } body { width: 70rem; }</style>")
    )
    problems = look(spoilt, 390, False)["problems"]
    assert any("overlap" in one for one in problems) and any(
        "wide in 390" in one for one in problems
    )


def test_the_script_is_allowed_to_run(pages: list[Path]) -> None:
    """With the page's own policy: the field is hidden until the script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={pages[0].parent / 'profile'}", pages[0].as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert '<label class="search">' in done.stdout
    assert '<label class="search" hidden>' in pages[0].read_text(encoding="utf-8")
