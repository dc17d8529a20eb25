"""Input is strict: what is not plain is refused before anything is loaded, in our own words."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from alphaspin import cli
from alphaspin.cli import parse
from alphaspin.config import Config, load_config
from alphaspin.errors import InputError
from alphaspin.foundation.section import RECORDED, Section
from alphaspin.schema import OURS, all_keys

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
LIBRARY = re.compile(r"pydantic|Input should|Value error|Traceback|type=|construct|!r|NoneType")


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert not LIBRARY.search(str(error.value)), error.value
    return str(error.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 1", "FILE:2: seed stands here again, first in line 1"),
        ("train: {lr: 1}\nseed: 1\n'train': {clip: 2}", "FILE:3: train stands here again"),
        ("train:\n  lr: 1\n  lr: 2", "FILE:3: train.lr stands here again, first in line 2"),
        ("a:\n - b: 1\n   b: 2", "FILE:3: a.b stands here again"),
        ("seed: !!int x", "FILE:1: !!int: recipes have no tags"),
        ("\nname: !!python/object:os.system x", "FILE:2: !!python/object:os.system"),
        ("name: ! x", "FILE:1: !: recipes have no tags"),
        ("seed: 1\n\nseed2: 2020-13-45", "FILE:3: unknown key 'seed2'; did you mean 'seed'?"),
        ("seed: 010", 'FILE:1: seed = 010: YAML reads 8; write that, or "010" for text'),
        ("seed: 1:30", "FILE:1: seed = 1:30: YAML reads 90"),
        (f"seed: {'9' * 5000}", "FILE:1: seed: what number is this?"),
        ("1: 2", "FILE:1: a key is a name"),
        ("? [a]\n: b", "FILE:1: a key is a name"),
        ("<<: 3", "FILE:1: << takes keys and values"),
        ("train:\n  <<: {lr: 1}\n  <<: {lr: 2}", "FILE:3: train.<< stands here again"),
        ("a: &a [*a]", "FILE:1: an alias without end"),
        ("a: &a {b: *a}", "FILE:1: an alias without end"),
        (LAUGHS, "an alias without end, or one that grows too large"),
        ("[" * 3000, "FILE:1: nested too deeply"),
        ("a: b: c", "FILE:1: not YAML: mapping values"),
        ("seed: 1\na: [", "FILE:2: not YAML"),
        ("a: *nope", "FILE:1: not YAML"),
        ("seed: 1\n---\nseed: 2", "FILE:2: not YAML"),
        ("seed: 1\nname: \x01", "FILE:2: not YAML"),
        ("%YAML 3.0\n---\na: b", "FILE:1: not YAML"),
        ("", "FILE: expected keys and values, found nothing"),
        ("- a", "FILE: expected keys and values, found list"),
        ("name: '" + "x" * 2**20 + "'", "FILE: a recipe has at most 1,048,576 bytes"),
    ],
)
def test_yaml_that_is_not_plain(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: true", "seed = True: needs a number, not true or false"),
        ("train: {lr: [1, true]}", "train.lr = [1, True]: needs a number, not true"),
        ("selfplay: {history: true}", "selfplay.history = True: needs a number, not true"),
        ("seed: yes", "seed = 'yes': needs a whole number"),
        ("seed: 1.5", "seed = 1.5: needs a whole number"),
        ("seed: -1", "seed = -1: needs a number >= 0"),
        ("train: {lr: x}", "train.lr = 'x': needs a number"),
        ("train: {lr: 1e300}", "train.lr = '1e300': needs a number between 1e-30 and 1e+30"),
        ("train: {lr: 1e-300}", "train.lr = '1e-300': needs a number between"),
        ("loss: {beta: [1, 1.0e+99]}", "loss.beta = [1, 1e+99]: needs a number between"),
        ("text: {template_options: {a: .nan}}", "a is no finite number"),
        ("output: 'https://u:pw@h/x'", "output = 'https://…@h/x': is an address"),
        ("train: {lr: .nan}", "train.lr = nan: needs a finite number"),
        ("reference: {alpha: .nan}", "reference.alpha = nan: needs"),
        ("train: {batch_size: 10000000000}", "train.batch_size = 10000000000: needs a whole"),
        ("selfplay: {iterations: 1000000}", "selfplay.iterations = 1000000: needs a number <="),
        ("lora: {r: 1000000}", "lora.r = 1000000: needs a number <= 16384"),
        ("train: {lr: []}", "train.lr = []: needs at least 1 of them"),
        ("train:", "train = None: needs keys and values"),
        ("name: 2024", "name = 2024: needs text (in quotes"),
        (f"name: {'x' * 300}", "needs at most 200 characters"),
        ("name: a/b", "name = 'a/b': needs letters, digits"),
        ("model: ''", "model = '': is empty"),
        ("output: ' '", "output = ' ': is empty"),
        ("heldout: ''", "heldout = '': is empty"),
        ("lora: {targets: ['']}", "lora.targets = ['']: is empty"),
        ('data: "a\\0b"', "has a NUL"),
        ('data: "\\ud800"', "half a character"),
        ("train: {schedule: linaer}", "'cosine' or 'constant' (did you mean 'linear'?)"),
        ("selfplay: {history: 0}", "selfplay.history = 0: needs a number >= 1 or 'inf'"),
        ("train: {activation_checkpointing: 2}", "needs true or false"),
        ("evaluate: {answer: '(('}", "evaluate.answer = '((': not a regular expression"),
        ("evaluate: {answer: abc}", "evaluate.answer = 'abc': needs a group"),
        ("evaluate: {answer: '(a{99999999999})'}", "not a regular expression"),
        ("method: '../x:y'", "needs module:Name"),
        ("loss: {kind: 'a b:c'}", "needs module:Name"),
        ("log: {trackers: [wandb, mlflow, wandb]}", "names wandb twice"),
    ],
)
def test_values_that_are_not_meant(tmp_path: Path, text: str, said: str) -> None:
    found = refused(recipe(tmp_path, f"\n{text}"))
    assert said in found
    if "method" not in text:
        assert found.startswith("FILE:2: "), "where it stands"


def test_the_line_of_what_does_not_go_together(tmp_path: Path) -> None:
    path = recipe(tmp_path, "train:\n  accumulation: 2\n  batch_size: 5\nseed: x\n")
    assert refused(path).startswith("FILE:4: seed = 'x'")
    path = recipe(tmp_path, "train:\n  accumulation: 2\n  batch_size: 5\n")
    assert refused(path).startswith("FILE:3: train.batch_size = 5 is not a multiple")


def test_plain_yaml_goes_on_working(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "name: 2020-01-01\n"
        "train: &train {lr: [1e-5, 2.5e-6], liger: off, activation_checkpointing: true}\n"
        "lora: {targets: [q_proj]}\n"
        "seed: 0x10\n"
        "selfplay: {prompts: 1_000, history: inf}\n",
    )
    config = load_config(str(path))
    assert config.name == "2020-01-01" and config.seed == 16
    assert config.train.lr == (1e-5, 2.5e-6) and config.train.liger == "off"
    assert config.train.activation_checkpointing and config.selfplay.prompts == (1000,)
    merged = "train:\n  <<: {lr: 1e-3, clip: 2}\n  lr: 1e-4\n"
    config = load_config(str(recipe(tmp_path, merged)))
    assert (config.train.lr, config.train.clip) == ((1e-4,), 2)


def test_records_are_taken_as_they_are() -> None:
    settings = {"train": {"lr": 1e200}, "heldout": ""}
    with pytest.raises(ValueError, match="between"):
        Config.model_validate(settings)
    assert Config.model_validate(settings, context=RECORDED).train.lr == (1e200,)


def test_sections_of_ones_own_are_as_strict() -> None:
    class Own(Section):
        text: str = ""
        size: float = 1.0
        flag: bool = False

    assert Own(text="", flag=True).text == ""
    for bad in ({"size": True}, {"size": 1e31}, {"text": "\0"}):
        with pytest.raises(ValueError, match=r"needs a number|NUL"):
            Own.model_validate(bad)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "1", "--seed", "1"], "--seed is given twice, as '1'"),
        (["--seed=1", "--train.lr=1", "--seed=2"], "--seed is given twice"),
        (["--train.batch-size=4", "--train.batch_size=4"], "--train.batch_size is given twice"),
        (["--selfplay.mixing", "--selfplay.no_mixing"], "--selfplay.mixing is given twice"),
        (["--loss.kind=dpo", "--loss.kind=ipo"], "--loss.kind is given twice"),
        (["--plan", "--plan"], "--plan is given twice"),
        (["--seed"], "--seed: needs a value"),
        (["--seed", "1", "2"], "--seed: '2' belongs to no option"),
        (["--plan", "words"], "--plan: 'words' is neither true nor false"),
        (["--no_seed"], "--seed is no flag"),
        (["--train", "3"], "--train is a section: set one of its keys"),
        (["--preference", "3"], "--preference is a section: this kind has no settings"),
        (["-x"], "'-x': belongs to no option"),
        (["--"], "'--': belongs to no option"),
        (["--seed=True"], "seed = 'True': needs a whole number"),
        (["--train.lr=abc"], "train.lr = 'abc': needs a number"),
        (["--train.lr=1e300"], "train.lr = ['1e300']: needs a number between"),
        (["--heldout="], "heldout = '': is empty"),
        (["--selfplay.history=0"], "selfplay.history = '0': needs a number >= 1 or 'inf'"),
        (
            ["--judge.kind=server", "--judge.model=m", "--judge.url=x"],
            "judge.url = 'x': needs an address",
        ),
        (["--log.trackers", "foo"], "log.trackers = 'foo': needs 'mlflow', 'tensorboard'"),
    ],
)
def test_command_lines(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        parse(["tiny", *words])
    assert said in str(error.value) and not LIBRARY.search(str(error.value))


@pytest.mark.parametrize(
    "words",
    [[""], ["plan", ""], ["evaluate", " "], ["report", ""], ["recipes", "copy", "tiny", ""]],
)
def test_empty_words(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["alphaspin", *words])
    with pytest.raises(SystemExit) as stop:
        (cli.train if len(words) == 1 else cli.main)()
    assert stop.value.code == 2 and "is no path" in capsys.readouterr().err


def test_an_environment_that_no_launcher_makes(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["alphaspin", "evaluate", "run"])
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "WORLD_SIZE = 'two'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *OURS.items(),
        *(("beta", "loss.beta"), ("num_train_epochs", "train.epochs"), ("output_dir", "output")),
        *(("lora_r", "lora.r"), ("lora_alpha", "lora.alpha"), ("lora_dropout", "lora.dropout")),
        *(("lora_target_modules", "lora.targets"), ("warmup_ratio", "train.warmup")),
        *(("lr_scheduler_type", "train.schedule"), ("optim", "train.optimizer")),
        *(("max_prompt_length", "text.max_prompt_tokens"), ("run_name", "name")),
        *(
            ("gradient_checkpointing", "train.activation_checkpointing"),
            ("top_p", "sampling.top_p"),
        ),
    ],
)
def test_options_of_trl_are_answered_with_ours(tmp_path: Path, theirs: str, ours: str) -> None:
    assert ours.partition(" ")[0] in all_keys(Config)
    with pytest.raises(InputError, match=re.escape(f"did you mean --{ours}?")):
        parse(["tiny", f"--{theirs.replace('_', '-')}", "1"])
    said = refused(recipe(tmp_path, f"model: tiny\n{theirs}: 1\n"))
    assert said == f"FILE:2: unknown key '{theirs}'; did you mean '{ours}'?"


@pytest.mark.parametrize("value", ["yes", "on", "1", "0", "1.0", '"true"', "t", "null"])
def test_booleans_of_recipes_are_true_or_false(tmp_path: Path, value: str) -> None:
    said = refused(recipe(tmp_path, f"selfplay:\n  mixing: {value}\n"))
    assert said.startswith("FILE:2: selfplay.mixing = ") and said.endswith(": needs true or false")
    plain = recipe(tmp_path, "selfplay:\n  mixing: TRUE\n")
    assert load_config(str(plain)).selfplay.mixing


def test_what_a_command_line_says() -> None:
    words = "--train.lr 1e-3 2e-3 --train.clip None --selfplay.no_warm_start --selfplay.mixing true"
    config, plan_only = parse(["tiny", *words.split(), "--lora.targets=q_proj", "--plan"])
    assert plan_only and config.train.lr == (1e-3, 2e-3) and config.train.clip is None
    assert not config.selfplay.warm_start and config.selfplay.mixing
    assert config.lora.targets == ("q_proj",)


def test_hints_of_a_command_line() -> None:
    facts: dict[str, Any] = dict.fromkeys(
        ("parameters", "hidden", "layers", "vocabulary", "adapter_parameters_per_rank"), 9
    ) | dict.fromkeys(("demonstrations", "prompt_tokens", "response_tokens"), 7)
    words = [f"--hints.{key}={value}" for key, value in facts.items()]
    config, _ = parse(["--model=a/b", "--data=c/d", *words])
    assert config.hints and config.hints.layers == 9
