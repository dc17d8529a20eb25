"""Who plays each iteration: the registry, the shares, and the losers that a run really draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import arithmetic, save_model, write_rows
from pydantic import ValidationError
from safetensors.numpy import load_file

from alphaspin.commands import job
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import load_demonstrations
from alphaspin.foundation.artefacts import file_hash
from alphaspin.methods.spin import contraction_note
from alphaspin.model.backbone import Backbone, average_adapters
from alphaspin.model.batching import Segment
from alphaspin.model.load import load_base
from alphaspin.model.stepper import Policy
from alphaspin.opponents.base import BASE, EMA, Player, assign, choose_prompts
from alphaspin.opponents.iterates import History, opponents
from alphaspin.sampling import gflownet
from alphaspin.sampling.answer import Draw
from alphaspin.sampling.decode import invert, uniforms
from alphaspin.sampling.mixture import Setting, sample

CAP = 10


def test_opponents_by_history() -> None:
    assert [opponents(t, 1) for t in range(4)] == [[BASE], [0], [1], [2]]
    assert [opponents(t, 2) for t in range(4)] == [[BASE], [BASE, 0], [0, 1], [1, 2]]
    assert opponents(1, 9) == [BASE, 0]
    assert [opponents(t, "inf") for t in range(4)] == [[BASE], [0], [0, 1], [0, 1, 2]]


def test_prompts_are_shared_equally() -> None:
    players = assign(list(range(100, 111)), [BASE, 0, 1])
    counts = [players.count(k) for k in (BASE, 0, 1)]
    assert sum(counts) == 11 and max(counts) - min(counts) <= 1


def test_iterations_walk_through_the_data_before_they_repeat() -> None:
    counts = History(prompts=(30, 50)).prompts
    first, second, third = (choose_prompts(100, counts, t, seed=3) for t in range(3))
    assert len(first) == 30 and len(set(first + second)) == 80  # fresh while the data lasts
    assert len(third) == len(set(third)) == 50  # across the lap, still without repetition
    assert set(range(100)) - set(first + second) <= set(third)
    assert choose_prompts(100, counts, 0, seed=4) != first
    assert sorted(choose_prompts(20, counts, 1, seed=3)) == list(range(20))


def players(settings: Config, iteration: int) -> list[Player]:
    return settings.selfplay.players(iteration, settings.reference)


def config(**selfplay: object) -> Config:
    return Config.model_validate({"reference": {"alpha": 0.75}, "selfplay": selfplay})


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("previous", [{BASE: 1.0}, {0: 1.0}, {1: 1.0}]),
        ("ema", [{BASE: 1.0}, {EMA: 1.0}, {EMA: 1.0}]),
        *(
            (f"mixture-{kind}", [{BASE: 1.0}, {0: 0.75, BASE: 0.25}, {1: 0.75, BASE: 0.25}])
            for kind in ("token", "smc", "gflownet")
        ),
    ],
)
def test_registry(kind: str, members: list[dict[int, float]]) -> None:
    found = [players(config(opponent=kind), t) for t in range(3)]
    assert [[dict(player.members) for player in group] for group in found] == [
        [expected] for expected in members
    ]


def test_fictitious_play_and_history_name_one_player_per_iterate() -> None:
    for t in range(4):
        fictitious = players(config(opponent="fictitious"), t)
        assert [player.members for player in fictitious] == [
            ((k, 1.0),) for k in opponents(t, "inf")
        ]
        assert len({player.name for player in fictitious}) == len(fictitious)
        last = players(config(history=2), t)
        assert [player.members[0][0] for player in last] == opponents(t, 2)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, {BASE: 1.0}), (1.0, {1: 1.0})])
def test_a_mixture_of_one_is_that_one(alpha: float, expected: dict[int, float]) -> None:
    settings = Config.model_validate(
        {"reference": {"alpha": alpha}, "selfplay": {"opponent": "mixture-token"}}
    )
    (player,) = players(settings, 2)
    assert dict(player.members) == expected and not player.name.startswith("mixture")


def test_the_mixture_is_with_the_average_where_the_reference_is() -> None:
    settings = Config.model_validate(
        {"reference": {"kind": "ema", "alpha": 0.5}, "selfplay": {"opponent": "mixture-token"}}
    )
    (player,) = players(settings, 2)
    assert dict(player.members) == {EMA: 0.5, BASE: 0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selfplay": {"opponent": "previous", "history": 2}}, "selfplay.history = 2 has no"),
        ({"selfplay": {"opponent": "ema", "warm_start": False}}, "selfplay.opponent = ema"),
        (
            {"selfplay": {"opponent": "mixture-token"}, "reference": {"kind": "arithmetic"}},
            "needs reference.kind = geometric, not .arithmetic",
        ),
        ({"method": "sppo", "selfplay": {"opponent": "ema"}}, "selfplay.opponent = 'ema'"),
        ({"gflownet": {"lr": 1.0}}, "gflownet.lr = 1 has no effect with selfplay.opponent"),
        ({"sampling": {"particles": 4}}, "sampling.particles = 4 has no effect"),
        (
            {"selfplay": {"opponent": "mixture-smc"}, "sampling": {"top_p": 0.9}},
            "selfplay.opponent = mixture-smc needs sampling.temperature = 1",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(changes)


def test_bound_of_the_consistent_version() -> None:
    """|α(1 - 1/β)| < 1 for β > α/(1+α), where β > 1/(1+α) is asked of the opponent π_{t-1}."""
    for beta, plain, consistent in ((0.4, True, True), (0.45, True, False), (0.6, False, False)):
        for kind, expected in (("previous", plain), ("mixture-token", consistent)):
            settings = Config.model_validate(
                {
                    "reference": {"alpha": 0.75},
                    "loss": {"beta": beta},
                    "selfplay": {"opponent": kind},
                }
            )
            assert bool(contraction_note(settings)) is expected


# Losers of whole runs


def losers(folder: Path) -> dict[int, list[int]]:
    """Answers by example in one shard."""
    data = load_file(folder / "answers.safetensors")
    parts = np.split(data["tokens"], data["length"].cumsum()[:-1])
    return {int(e): part.tolist() for e, part in zip(data["example"], parts, strict=True)}


def drawn(
    backbone: Backbone, weights: Policy, prompt: np.ndarray, noise: torch.Tensor
) -> list[int]:
    """An answer of Π π_k^w_k, token by token, each policy by a whole forward pass of its own."""
    ids, stops = prompt.tolist(), set(backbone.stop_ids)
    for u in noise:
        logits = torch.zeros(1, backbone.head.weight.shape[0])
        for name, weight in weights.items():
            with torch.no_grad():
                decoder = backbone.routed([Segment(name, 0, 1)])
                hidden = decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
                logits += weight * backbone.logits(hidden[:, -1])
        ids.append(int(invert(logits.softmax(-1), u[None])))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def settings_of(folder: Path, kind: str) -> Config:
    """A small run of three iterations with rates at which the iterates differ."""
    save_model(folder / "model")
    write_rows(folder / "data.jsonl", arithmetic(12))
    fields: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "output": str(folder / "run"),
        "reference": {"alpha": 0.6} | ({"ema_decay": 0.25} if kind == "ema" else {}),
        "selfplay": {"opponent": kind, "iterations": 3, "prompts": 12},
        "text": {"max_response_tokens": CAP},
        "lora": {"r": 2},
        "train": {"batch_size": 4, "lr": 0.05},
        "evaluate": {"prompts": 0},
    }
    if kind == "mixture-smc":
        fields["sampling"] = {"particles": 4, "shard_size": 7}
    if kind == "mixture-gflownet":
        fields["gflownet"] = {"epochs": 1, "batch_size": 6, "answers": 8, "checkpoint_every": 1}
    return Config.model_validate(fields)


@pytest.mark.parametrize("kind", ["ema", "mixture-token", "mixture-smc", "mixture-gflownet"])
def test_losers_come_from_the_policy_that_is_named(tmp_path: Path, kind: str) -> None:
    settings = settings_of(tmp_path, kind)
    job.run(settings)
    backbone, tokenizer = load_base(settings.model, dtype="fp32", device=torch.device("cpu"))
    chat = ChatFormat.create(tokenizer, "auto", backbone.stop_ids)
    demos, _ = load_demonstrations(settings.data, chat, settings.text)
    iterations = tmp_path / "run/iterations"
    backbone.load_adapter("older", iterations / "0/adapter")
    backbone.load_adapter("newer", iterations / "1/adapter")
    if kind == "ema":
        average = average_adapters(
            backbone.adapter_state("older"), backbone.adapter_state("newer"), 0.25
        )
        backbone.set_adapter_state("newer", average)
    if kind == "mixture-gflownet":
        backbone.load_adapter("sampler", iterations / "2/sampler/adapter")
    shards = sorted((iterations / "2/opponents").glob(f"{kind}-*"))
    found = {e: answer for shard in shards for e, answer in losers(shard).items()}
    assert sorted(found) == list(range(12))

    def expected(weights: Policy) -> dict[int, list[int]]:
        if kind == "mixture-smc":
            setting = Setting(weights, 4, CAP, chat.stop_token_ids)
            prompts = [demos[e].prompt for e in found]
            noise = [Draw(0, 2, "sample", e) for e in found]
            answers, _ = sample(backbone, setting, prompts, noise, method="smc")
            return {e: answer.tokens.tolist() for e, answer in zip(found, answers, strict=True)}
        return {
            e: drawn(backbone, weights, demos[e].prompt, uniforms(0, 2, "sample", e, CAP))
            for e in found
        }

    mixture: Policy = {"newer": 0.6, None: 0.4}
    own: dict[str, Policy] = {
        "ema": {"newer": 1.0},
        "mixture-gflownet": {"newer": 0.6, "sampler": 1.0, None: -0.6},
    }
    assert found == expected(own.get(kind, mixture))
    assert found != expected({"older": 1.0}), "the iterates are too alike for this test"


def test_a_sampler_that_is_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the sampler's second step of t = 1, the run ends as an undisturbed one."""
    settings = settings_of(tmp_path, "mixture-gflownet")
    job.run(settings)
    again = settings.model_copy(update={"output": str(tmp_path / "again")})
    accumulate, calls = gflownet.accumulate, 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return accumulate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gflownet, "accumulate", failing)
        job.run(again)
    assert list((tmp_path / "again/iterations/1/sampler/checkpoints").glob("step-*"))
    job.run(again)
    one, other = (
        {
            str(p.relative_to(tmp_path / name)): file_hash(p)
            for p in (tmp_path / name).rglob("*.safetensors")
        }
        for name in ("run", "again")
    )
    assert one == other and sum("sampler" in name for name in one) == 2
