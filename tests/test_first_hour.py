"""What a new user types first: a recipe after a look at both, words that a shell completes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import arithmetic, save_model, write_rows

from alphaspin import cli
from alphaspin.commands import completion, initial
from alphaspin.config import Config, PlanHints, load_config
from alphaspin.errors import InputError

FACTS = PlanHints(
    parameters=1e6,
    hidden=64,
    layers=2,
    vocabulary=500,
    adapter_parameters_per_rank=1000,
    demonstrations=100,
    prompt_tokens=8,
    response_tokens=8,
)


def test_a_recipe_is_written_after_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_rows(tmp_path / "data.jsonl", arithmetic(40))
    options = ["--model=model", "--data=data.jsonl", "--lora.r=2", "--selfplay.iterations=1"]
    options += ["--evaluate.prompts=4", "--selfplay.prompts=12"]
    cli._init(["mine.yaml", *options])
    text = Path("mine.yaml").read_text()
    found = yaml.safe_load(text)
    assert found["text"]["max_response_tokens"] == 32 and "  # Longest response" in text
    assert "0 % of the answers are longer" in text and "responses 50 % ≤" in text
    assert found["train"]["batch_size"] == 8 and "2 steps of an iteration from 12 rows" in text
    assert found["lora"]["r"] == 2 and found["selfplay"]["iterations"] == 1
    assert [*found][:2] == ["model", "data"] and "name" not in found
    with pytest.raises(InputError, match=r"mine\.yaml exists already"):
        cli._init(["mine.yaml", *options])
    assert Path("mine.yaml").read_text() == text
    printed = capsys.readouterr().out
    assert "alphaspin-train mine.yaml" in printed and "runs/mine-" in printed
    with pytest.raises(InputError, match=r"ends in \.yaml"):
        cli._init(["mine", *options])
    with pytest.raises(InputError, match="name"):
        cli._init(["my recipe.yaml", *options])
    assert not Path("my recipe.yaml").exists()
    assert load_config("mine.yaml").text.longest == 64
    cli._train(["mine.yaml"])
    assert [*tmp_path.glob("runs/mine-*/report.html")]


def test_batches_fit_the_rows_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("default")
    text = config.text.sized({"max_prompt_tokens": 32, "max_response_tokens": 32})
    config = config.model_copy(update={"text": text})
    many = FACTS.model_copy(update={"demonstrations": 5000})
    assert initial.fitting(config, many) == (config, [])
    few, (note,) = initial.fitting(config, FACTS)
    assert (few.train.batch_size, few.train.accumulation) == (8, 2) and "13 steps" in note
    # 2 * 96 tokens, a prompt and its two answers twice, and one less than that.
    monkeypatch.setattr(initial, "room", lambda *_: 2 * 96)
    assert initial.fitting(config, many)[0].train.accumulation == 32
    monkeypatch.setattr(initial, "room", lambda *_: 2 * 96 - 1)
    smaller, (note,) = initial.fitting(config, many)
    assert smaller.train.accumulation == 64 and "holds 191 tokens" in note
    assert Config.model_validate(smaller.model_dump()) == smaller


COMPLETED = {
    "alphaspin tr": {"train"},
    "alphaspin train --selfplay.opp": {"--selfplay.opponent"},
    "alphaspin train --loss.kind ip": {"ipo"},
    "alphaspin train --loss.ipo_l": {"--loss.ipo_length"},  # of a kind that is not chosen
    "alphaspin train --train.dtype b": {"bf16"},
    "alphaspin train tiny-sp": {"tiny-sppo", "tiny-space"},
    "alphaspin train mine": {"mine.yaml"},
    "alphaspin train --data da": {"data.jsonl"},
    "alphaspin evaluate --benchmark mt": {"mt-bench"},
    "alphaspin evaluate ru": {"runs"},
    "alphaspin doctor --sh": {"--short"},
    "alphaspin-train --lora.dr": {"--lora.dropout"},
}
SHELLS = {
    "bash": """
        source alphaspin.bash; source alphaspin-train.bash
        while IFS= read -r line; do
            COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
            $(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            echo ${COMPREPLY[*]}
        done
    """,
    "fish": """
        source alphaspin.fish; source alphaspin-train.fish
        while read -l line
            echo (complete -C "$line" | cut -f1 | string trim -rc / | string join " ")
        end
    """,
    "zsh": """
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell 'PS1= ; fpath=($PWD $fpath); autoload -Uz compinit; compinit -u'
        zpty -w shell 'report() { zle complete-word; print -r -- "<$BUFFER>"; zle kill-whole-line }'
        zpty -w shell 'zle -N report; bindkey "^G" report'
        while IFS= read -r line; do
            zpty -n -w shell "$line"$'\\a'
            zpty -r -m shell found "*<$line*>*"
            found=${found##*<}; print -r -- ${${${found%%>*}%% }##* }
        done
    """,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("mine.yaml", "data.jsonl"):
        Path(name).touch()
    for program in completion.PROGRAMS:
        cli._completion([shell, program])
        name = f"_{program}" if shell == "zsh" else f"{program}.{shell}"
        Path(name).write_text(capsys.readouterr().out)
    lines = [line for line in COMPLETED if shell != "zsh" or len(COMPLETED[line]) == 1]
    done = subprocess.run(
        [shell, "-c", SHELLS[shell]],
        input="".join(f"{line}\n" for line in lines),
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm"},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = dict(zip(lines, done.stdout.splitlines(), strict=True))
    for line in lines:
        assert {*found[line].replace("/", "").split()} == COMPLETED[line], (line, done.stderr)


def test_other_shells_are_refused() -> None:
    for words in ([], ["ksh"], ["bash", "ls"], ["bash", "alphaspin", "more"]):
        with pytest.raises(InputError, match="usage: alphaspin completion bash"):
            cli._completion(words)


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["alphaspin", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli._COMMANDS[command](["--help"])
    assert not ended.value.code and capsys.readouterr().out.startswith("usage: alphaspin")
