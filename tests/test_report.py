"""The report is read by people and mailed around: its numbers, its safety and its size count."""

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import painted

from alphaspin.config import Config
from alphaspin.errors import InputError
from alphaspin.evaluation.record import Measures
from alphaspin.foundation.artefacts import commit
from alphaspin.report import overview, plots
from alphaspin.report import page as report

EVIL = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"


def row(name: str, k: int, **changes: Any) -> dict[str, Any]:
    values = {
        "name": name,
        "nll": 40.1234 - 3 * k,
        "nll_per_token": 5.5,
        "sampled": 0.1117 * (k + 1),
        "sampled_se": 0.0213,
        "greedy": 0.1339 * (k + 1),
        "greedy_se": 0.0307,
        "margin": 1.2345 * k,
        "preferred": 0.5 + 0.0771 * k,
        "preferred_se": 0.0189,
    }
    return values | changes


def summary(**changes: Any) -> dict[str, Any]:
    config = Config.model_validate(
        {
            "control": "sft",
            "selfplay": {"iterations": 2, "history": 3},
            "reference": {"alpha": 0.95},
            "loss": {"beta": [0.25, 5.0]},
            "lora": {"r": 7, "alpha": 14},
        }
    )
    return {
        "name": "probe",
        "config": config.model_dump(mode="json"),
        "environment": {"torch": "2.99.0", "device": "cuda NVIDIA H100"},
        "adapters": {"train/0": "a0" * 32, "train/1": "a1" * 32, "control/0": "c0" * 32},
        "rows": [
            row("base", 0, nll_se=0.4567),
            row("0", 1),
            row("1", 2),
            row("sft 0", 3),
            row("sft 1", 4),
        ],
        "seconds": {"opponents": 3723.0, "train": 59.96, "evaluate": 119.7},
        "alarms": [],
        "notes": [],
        "samples": [
            {
                "origin": "data.jsonl:1",
                "prompt": "what is 1 + 1?",
                "demonstration": "it is 2",
                "answers": {"base": "no\x00\x1b", "0": "", "1": "it  is 2", "sft 0": "it is 22"},
            }
        ],
    } | changes


def step(t: int, s: int, **values: Any) -> dict[str, Any]:
    numbers = {
        "loss": 1 / s,
        "rewards/chosen": 0.01 * s,
        "rewards/rejected": -0.02 * s,
        "rewards/margins": 0.03 * s,
        "rewards/accuracies": 0.5 + 0.5 * math.tanh(s / 10),
        "logps/chosen": -40.0 + s,
        "logps/rejected": -60.0 - s,
        "grad_norm": 2.0 + math.sin(s),
        "learning_rate": 1e-5 / s,
    }
    return {"stage": f"train/{t}", "step": s, **numbers, **values}


STEPS = [step(t, s) for t in (0, 1) for s in range(1, 9)]


def make_run(
    folder: Path, content: dict[str, Any] | None = None, records: list[dict[str, Any]] = STEPS
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary() if content is None else content))
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def page(folder: Path, *args: Any) -> str:
    path = report.write(make_run(folder, *args))
    assert path == folder / "report.html"
    assert not list(folder.glob(".tmp-*"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run with everything in it; drawing is what takes time here."""
    return page(tmp_path_factory.mktemp("usual"))


class Elements(HTMLParser):
    """Tags with their attributes, and the text of the page's table cells and list items."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "br", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    @property
    def plots(self) -> int:
        return sum(name == "svg" and "aria-label" in attrs for name, attrs in self.tags)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def plain(text: str) -> str:
    """The page without tags, white space as single blanks."""
    body = text.split("</head>")[1]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_table_holds_the_measures_with_their_errors(usual: str) -> None:
    text = plain(usual)
    assert "base 40.123 ± 0.457 11.2 ± 2.1 13.4 ± 3.1 +0.000 – 0 37.123 22.3 ± 2.1" in text
    assert "1 34.123 33.5 ± 2.1 40.2 ± 3.1 +2.469 65.4 ± 1.9 Control:" in text
    assert "sft 1 28.123 55.9 ± 2.1 67.0 ± 3.1 +4.938 80.8 ± 1.9" in text


def test_says_what_was_done_and_where(usual: str) -> None:
    text = plain(usual)
    assert (
        "probe 2 iterations of α-SPIN on tiny: logistic (DPO) loss with β = 0.25, 5; reference "
        "α = 0.95 (geometric); opponents from the last 3 iterates (history 3); LoRA of rank 7 with "
        "alpha 14; plain further SFT at equal cost as control. "
    ) in text
    assert "opponents 1 h 02 min train 1 min 00 s evaluate 2 min 00 s all 1 h 05 min" in text
    assert f"train/1 train/0 {'a1' * 32} control/0 the base {'c0' * 32}" in text
    assert "history: 3 " in text and "No alarms in training." in text


def test_other_losses_are_described_too() -> None:
    changes = {"loss": {"kind": "ipo"}, "selfplay": {"iterations": 1, "history": "inf"}}
    text = report.describe(Config.model_validate(changes))
    assert text.startswith("1 iteration of SPIN on tiny: IPO loss with τ = 0.1; reference α = 1 ")
    assert "all iterates so far (fictitious play)" in text and "control" not in text
    slic = report.describe(Config.model_validate({"loss": {"kind": "slic"}}))
    assert "δ = 1, λ = 0" in slic and "reference" not in slic


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    sample = {"origin": EVIL, "prompt": EVIL, "demonstration": EVIL, "answers": {"base": EVIL}}
    content = summary(
        name=EVIL, samples=[sample], alarms=[EVIL], notes=[EVIL], environment={EVIL: EVIL}
    )
    content["adapters"] = {"train/0": EVIL}
    content["config"]["model"] = EVIL
    content["seconds"] = {EVIL: 1.0}
    text = page(tmp_path, content, [])
    elements = Elements(text)
    names = [name for name, _ in elements.tags]
    assert not {*names} & {"img", "iframe", "object", "embed", "link"}
    # The one script is ours, and the only one that the browser is allowed to run.
    own = (Path(report.__file__).parent / "search.js").read_text()
    assert names.count("script") == 1 and f"<script>{own}</script>" in text
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text
    assert not any(key.startswith("on") for _, attrs in elements.tags for key in attrs)


def test_is_whole_and_fetches_nothing(usual: str) -> None:
    text = usual
    elements = Elements(text)
    assert elements.open == [] or elements.open == ["html"]
    for _, attributes in elements.tags:
        for key in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "https:" not in text and "http:" not in text
    assert "default-src 'none'" in text  # the browser enforces it as well
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    assert used and used <= set(ids)
    assert elements.plots == 9


def test_plots_use_the_colours_of_the_page(usual: str) -> None:
    fixed = re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]*", usual.split("</head>")[1])
    assert not fixed  # they would stay as they are in the dark
    assert set(re.findall(r"var\(--(\w+)\)", usual)) <= set(re.findall(r"--(\w+):", usual))


def test_axes_hold_all_curves(usual: str) -> None:
    plot = usual[usual.index('aria-label="Exact matches') :].split("</svg>")[0]
    ticks = re.findall(r">([^<]*)</text>", plot)
    assert "20" in ticks and "60" in ticks  # from the base's 11.2 % to the control's 67.0 %
    lowest, highest = 0.08 * 180, 0.83 * 180  # the frame, in the SVG's units from the top
    for path in re.findall(r'<path d="([^"]*)"[^>]*clip-path', plot, flags=re.DOTALL):
        heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
        assert lowest - 0.1 <= min(heights) and max(heights) <= highest + 0.1


def test_tick_labels_keep_their_digits(tmp_path: Path) -> None:
    records = [step(0, s, learning_rate=0.001 * s) for s in range(1, 5)]
    text = page(tmp_path, summary(rows=[]), records)
    labels = re.findall(r">([^<]*)</text>", text[text.index('aria-label="Learning rate"') :])
    assert "0.002" in labels and "0.004" in labels


def test_exact_matches_are_marked_and_odd_characters_seen(tmp_path: Path, usual: str) -> None:
    assert "t = 1 ✓ no␀␛ it is 2 " in plain(usual)
    assert "<del>no␀␛</del><ins>it  is 2</ins>" in usual
    assert usual.count('<tr class="same">') == 1
    assert "no␀␛" in usual and "t = 0 (empty)" in plain(usual)
    assert "what is 1 + 1?" in usual
    content = summary()
    del content["samples"][0]["prompt"]
    content["config"]["evaluate"]["answer"] = "is (.)"
    text = page(tmp_path, content, [])
    assert text.count('<tr class="same">') == 2 and "<th>prompt" not in text


def test_alarms_of_summary_and_metrics_show_once(tmp_path: Path) -> None:
    records = [
        {"stage": "train/1", "step": 3, "alarm": "both fall"},
        *STEPS,
        {"stage": "control/0", "step": 1, "alarm": "no gradient"},
    ]
    alarms = ["train/1: both fall", "elsewhere: smoke"]
    text = page(tmp_path, summary(alarms=alarms, notes=["β is small"], rows=[]), records)
    assert (
        "Alarm train/1, step 3: both fall Alarm control/0, step 1: no gradient "
        "Alarm elsewhere: smoke Note β is small"
    ) in plain(text)
    assert "No alarms" not in text
    # One line in each of the seven plots by step, at global step 8 + 3.
    assert text.count("stroke: var(--alarm)") == 7


def test_comparisons_and_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `alphaspin evaluate` left in the folder, by policy in order; damaged parts are not."""
    place = make_run(tmp_path) / "evaluation" / "heldout-12345678"
    measured = {"kl": 0.25, "kl_se": 0.125, "length": 7.5, "length_se": 0.5, "self_bleu": 0.375}
    measured |= {"distinct_1": 0.5, "distinct_2": 0.75, "distinct_3": None}
    judged = {"judged": 0.6, "judged_se": 0.02, "judged_low": 0.55, "judged_high": 0.65}
    judged |= {"controlled": 0.52, "controlled_low": 0.47, "controlled_high": 0.57}
    names = ["base", "0", "2", "10", "sft 0"]
    for k, name in enumerate(names):
        with commit(place / name) as folder:
            content = json.dumps(row(name, k) | measured | judged | {"answers": ["x"]})
            (folder / "evaluation.json").write_text(content)
    about = {"heldout": EVIL, "prompts": 77, "judge": f"callable:{EVIL}"}
    (place / "about.json").write_text(json.dumps(about))
    results = {"sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.25}}
    for name in ("0", "base"):
        with commit(tmp_path / "evaluation" / "tasks-0" / name) as folder:
            found = {"harness": "0.4.99", "chat": True, "results": results}
            (folder / "results.json").write_text(json.dumps(found))
    page = report.write(tmp_path).read_text(encoding="utf-8")
    text = plain(page)
    assert "Compared with the base on 77 held-out prompts" in text
    assert "10 31.123 ± 0.213" not in text  # the row has no standard error of the NLL
    cells = "60.0 [55.0, 65.0] 52.0 [47.0, 57.0] 7.5 ± 0.5 0.250 ± 0.125 0.50 0.75 – 0.375"
    assert text.count(cells) == len(names) - 1
    after = text[text.index("Compared with the base") :]
    order = [after.index(f" {name} {40.1234 - 3 * k:.3f}") for k, name in enumerate(names)]
    assert order == sorted(order)
    assert "base 40.123 11.2 ± 2.1 – – 7.5" in after
    assert "lm-evaluation-harness 0.4.99, chat template task metric base 0 sums acc" in text
    assert "0.5 ± 0.25 0.5 ± 0.25" in text
    elements = Elements(page)
    assert elements.open in ([], ["html"])
    assert not {name for name, _ in elements.tags} & {"img", "iframe"}
    assert elements.plots == 11
    for content in (
        "[]",
        "{}",
        '{"title": "x", "results": 5}',
        '{"title": 5, "results": {"a": 3}}',
    ):
        with commit(tmp_path / "evaluation" / "tasks-0" / "0") as folder:
            (folder / "results.json").write_text(content)
        with pytest.raises(InputError, match="tasks-0: not as alphaspin writes it"):
            report.write(tmp_path)
    shutil.rmtree(tmp_path / "evaluation" / "tasks-0")
    (place / "10" / "evaluation.json").write_text("{}")
    assert report.write(tmp_path).read_text(encoding="utf-8").count("[55.0, 65.0]") == 3
    (place / "about.json").unlink()
    report.write(tmp_path)
    assert "about.json: missing; `alphaspin evaluate` writes it again" in " ".join(
        capsys.readouterr().out.split()
    )


def test_works_without_evaluation(tmp_path: Path) -> None:
    text = page(tmp_path, summary(rows=[], samples=[], alarms=[], adapters={}, seconds={}))
    assert "this run was not evaluated" in text and "Sample answers" not in text
    assert text.count("<svg viewBox") == 7 and "nan" not in plain(text)


def test_works_with_one_iteration_and_no_control(tmp_path: Path) -> None:
    rows = [row("base", 0, nll=0.3), row("0", 1, nll=math.nan)]
    text = page(tmp_path, summary(rows=rows, name="прогон α → 数"), STEPS[:1])
    assert "<h1>прогон α → 数</h1>" in text
    assert "0 nan 22.3 ± 2.1" in plain(text) and "Control:" not in text
    assert '<span class="a dashed">' not in text
    nll = re.findall(r">([^<]*)</text>", text[text.index('aria-label="NLL') :].split("</svg>")[0])
    assert "0.3" in nll and "5" not in nll  # the axis is as long as the values, not a share's


def test_works_without_steps_or_with_torn_ones(tmp_path: Path) -> None:
    assert "No training steps" in page(tmp_path, summary(rows=[]), [])
    make_run(tmp_path, summary(rows=[]))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train/1", "step": 9, "loss": NaN, "grad_norm": Infinity}\n')
        file.write('{"stage": "train/1", "st')
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|\binf\b", text.split("</head>")[1])
    assert "Where the margin comes from" in text


def test_numbers_that_are_not_finite_are_left_out() -> None:
    records = [
        {"stage": "train/1", "step": 2, "loss": math.nan, "grad_norm": math.inf, "tokens": 3},
        {"stage": "train/0", "step": 1, "loss": 0.5, "note": "text"},
        {"stage": "train/0", "step": 1, "alarm": "x"},
        {"stage": "control/0", "step": 1, "loss": 0.25},
        {"step": 1, "loss": 0.25},
    ]
    kept = {0: {1: {"step": 1.0, "loss": 0.5}}, 1: {2: {"step": 2.0, "tokens": 3.0}}}
    assert report.training_steps(records) == kept


def test_long_runs_are_thinned_and_their_extremes_kept(tmp_path: Path) -> None:
    records = [step(t, s, grad_norm=1.0) for t in (0, 1, 2) for s in range(1, 1001)]
    records[777]["grad_norm"] = 987.0
    for s, record in enumerate(records):
        record["loss"] = math.sin(s) + math.sin(s * s)  # nothing that an SVG writer can simplify
    text = page(tmp_path, summary(rows=[]), records)
    assert len(text) < 1_000_000
    points = [len(re.findall("[ML]", d)) for d in re.findall(r' d="([^"]*)"', text)]
    assert 100 <= max(points) <= 2 * plots.POINTS  # a band goes there and back
    plot = text[text.index('aria-label="Gradient norm') :].split("</svg>")[0]
    assert "800" in re.findall(r">([^<]*)</text>", plot)  # the axis reaches the one outlier
    assert "drawn as their mean" in text


def test_equal_runs_have_equal_pages(tmp_path: Path, usual: str) -> None:
    assert page(tmp_path) == usual


def test_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such run folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"summary\.json: missing; a run writes it when it ends"):
        report.write(tmp_path)
    make_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert "the records of train/0, train/1, control/0 are missing" in plain(
        report.write(tmp_path).read_text(encoding="utf-8")
    )
    (tmp_path / "report.html").unlink()
    make_run(tmp_path)
    for content, message in [
        ('{"name": "x"', r"summary\.json: not JSON: .*line 1"),
        ("[]", r"summary\.json: "),
        ("{}", r"summary\.json: name: is needed"),
        (
            json.dumps(summary(rows=[row("0", 1, nll="low")])),
            r"summary\.json: rows\.0\.nll = 'low': needs a number",
        ),
        (
            json.dumps(summary(rows=[row("best", 1)])),
            r"summary\.json: rows\.0\.name = 'best': needs ",
        ),
    ]:
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(InputError, match=message):
            report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def of_seed(seed: int, shift: float, **changes: Any) -> dict[str, Any]:
    """A run whose NLLs are `shift` above the usual ones."""
    content = summary(**changes)
    content["config"]["seed"] = seed
    for one in content["rows"]:
        one["nll"] += shift
    return content


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    other = of_seed(3, 5.0)
    other["config"]["reference"]["alpha"] = 0.5
    contents = [of_seed(3, 0.0), of_seed(4, 0.3), other]
    folders = [make_run(tmp_path / str(k), content) for k, content in enumerate(contents)]
    path = overview.write(folders, tmp_path / "all.html")
    text = path.read_text(encoding="utf-8")
    elements, words = Elements(text), plain(text)
    assert elements.open == [] or elements.open == ["html"]
    assert "3 runs of 4 settings" in words
    # Base of the first setting: the mean of 40.1234 and 40.4234, with s / sqrt(2) = 0.15.
    assert "probe, reference.alpha = 0.95 2 40.273 ± 0.150 37.273 ± 0.150" in words
    assert "probe, reference.alpha = 0.95, SFT control 2 40.273 ± 0.150 31.273 ± 0.150" in words
    # One run: the error over prompts, where it was written down.
    assert "probe, reference.alpha = 0.5 1 45.123 ± 0.457 42.123 39.123" in words
    assert "probe, reference.alpha = 0.5 1 11.2 ± 2.1 22.3 ± 2.1 33.5 ± 2.1" in words
    assert "Judge's win rate" not in words  # these runs had no judge
    assert elements.plots == 3
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(re.findall(r"--(\w+):", text))
    overview.write(folders, path)
    assert path.read_text(encoding="utf-8") == text


def test_a_page_about_several_runs_has_no_paths(tmp_path: Path) -> None:
    contents = [summary(), summary()]
    for name, content in zip("ab", contents, strict=True):
        content["config"]["model"] = f"/secret/{name}/sft-{name}"
    folders = [make_run(tmp_path / str(k), content) for k, content in enumerate(contents)]
    text = overview.write(folders, tmp_path / "all.html").read_text(encoding="utf-8")
    assert "model = sft-a" in text and "/secret" not in text and str(tmp_path) not in text


def test_settings_are_told_apart_by_more_than_hue() -> None:
    found = [overview.Setting("x", control) for _ in range(24) for control in (False, True)]
    looks = [plots.look(overview.style(found, number)) for number in range(48)]
    shapes = {str([(k, v) for k, v in one.items() if k != "color"]) for one in looks}
    assert len(shapes) == 48
    hollow = [one["markerfacecolor"] == plots.COLOURS["page"] for one in looks]
    assert hollow == [False, True] * 24
    assert all(
        one["color"] == other["color"] for one, other in zip(looks[::2], looks[1::2], strict=True)
    )
    curves = {json.dumps([str(v) for v in plots.look(letter).values()]) for letter in "abcdefgh"}
    assert len(curves) == len({str(marker) for marker in plots.MARKERS.values()}) == 8


def test_shares_of_equal_pairs(tmp_path: Path) -> None:
    records = [step(t, s, **{"pairs/informative": 0.75 - t / 2}) for t in (0, 1) for s in (1, 2)]
    text = page(tmp_path, summary(), records)
    assert "0 37.123 22.3 ± 2.1 26.8 ± 3.1 +1.234 57.7 ± 1.9 25 1 34.123" in plain(text)
    assert "<code>--control sft</code>" not in text  # there is one
    assert "<code>evaluate.prompts</code>" in page(tmp_path, summary(rows=[]), [])
    assert "Pairs of equal answers, which teach nothing: 25 % at first, 75 %" in plain(text)
    absolute = summary()
    absolute["config"] |= {"loss": {"kind": "space"}, "reference": {"alpha": 1}}
    # It learns from them too, so nothing is known.
    assert "equal pairs" not in plain(page(tmp_path, absolute, records))
    judged = summary(pairs=[{"iteration": 1, "prompts": 8, "pairs": 6, "ties": 2}])
    judged["config"] = Config.model_validate({"method": "sppo"}).model_dump(mode="json")
    text = plain(page(tmp_path, judged, records))
    assert "equal pairs %" in text and "prompts whose responses all tie" in text


def test_several_runs_must_be_comparable(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    with pytest.raises(InputError, match="two runs with the same settings and seed 0"):
        overview.write([one, make_run(tmp_path / "two")], tmp_path / "all.html")
    empty = make_run(tmp_path / "empty", summary(rows=[], name="bare"))
    with pytest.raises(InputError, match="bare: was not evaluated"):
        overview.write([one, empty], tmp_path / "all.html")
    assert not (tmp_path / "all.html").exists()


def test_rows_may_lack_any_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "draw", painted)
    full = {name: 0.5 for name in Measures.model_fields if name != "name"}
    for missing in full:
        rows = [full | {"name": name} for name in ("base", "0", "sft 0")]
        del rows[1][missing]
        page(tmp_path, summary(rows=rows), STEPS[:1])
