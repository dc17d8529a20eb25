"""A run that starts from an adapter: what is the base elsewhere is the base with the adapter.

The other side is PEFT alone, on an adapter that PEFT has made and saved.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import arithmetic, save_model, write_rows
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_backbone import make_trees, plain_logps, relative
from test_families import FAMILIES, save
from test_resume import finish, result, settings
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphaspin.cli import parse
from alphaspin.commands.played import Played
from alphaspin.errors import EXIT_INPUT, InputError
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.batching import collate
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY
from alphaspin.model.scoring import ReferenceCache, score, sequence_logps
from alphaspin.model.settings import LoraConfig
from alphaspin.model.tree import Tree
from alphaspin.model.verify import verify
from alphaspin.sampling.decode import Request, decode
from alphaspin.sampling.remote import ServerSampler
from alphaspin.sampling.settings import SamplingConfig

CPU = torch.device("cpu")
FORM: dict[str, Any] = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start")
    save_model(path / "model")
    write_rows(path / "data.jsonl", arithmetic(30))
    adapt(path / "sft", path / "model")
    return path


def plain(model: Path) -> Any:
    load = cast(Any, AutoModelForCausalLM.from_pretrained)
    return load(str(model), dtype=torch.float32, attn_implementation="eager")


def adapt(target: Path, model: Path, **changes: Any) -> Path:
    """What somebody's SFT leaves: PEFT's files, with updates that show."""
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "lora_dropout": 0.1, **FORM, **changes}
    config = PeftLoraConfig(**settings)
    adapted = get_peft_model(plain(model), config)
    random = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    adapted.save_pretrained(str(target))
    return target


def started(folder: Path, sft: Path) -> tuple[Backbone, LoraConfig]:
    backbone, _ = load_base(str(folder / "model"), dtype="fp32", device=CPU)
    config = LoraConfig(start=str(sft))
    backbone.start_from(sft, config)
    backbone.add_adapter(POLICY, config, seed=0, iteration=0)
    return backbone.eval(), config


def by_peft(folder: Path, sft: Path, trees: Sequence[Tree]) -> Tensor:
    with torch.no_grad():
        peft = PeftModel.from_pretrained(plain(folder / "model"), str(sft)).eval()
        return plain_logps(peft, trees)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_none_is_the_base_with_the_adapter(
    folder: Path, tmp_path: Path, rslora: bool, layout: Any
) -> None:
    sft = adapt(tmp_path / "sft", folder / "model", use_rslora=rslora)
    backbone, config = started(folder, sft)
    assert (config.r, config.alpha, config.use_rslora) == (3, 9.0, rslora)
    assert config.targets == ("down_proj", "q_proj")
    trees = make_trees(5, 1)
    expected = by_peft(folder, sft, trees)
    with torch.no_grad():
        assert (expected - plain_logps(plain(folder / "model"), trees)).abs().max() > 0.1
        groups = [(POLICY, trees), (None, trees)]
        found = sequence_logps(backbone, collate(groups, layout=layout))
        with backbone.plain(None) as hidden_of:  # what the start-up check compares with
            ids = torch.from_numpy(np.concatenate([trees[0].prompt, *trees[0].responses])).long()
            one = backbone.logits(hidden_of(ids[None], None))[0, :-1].log_softmax(-1)
    torch.testing.assert_close(found, torch.cat([expected, expected]), rtol=0, atol=1e-4)
    own = one.gather(1, ids[1:, None])[len(trees[0].prompt) - 1 :].sum()
    assert abs(float(own - expected[0])) < 1e-4
    # A trained policy is another, and None stays what it was.
    state = backbone.adapter_state(POLICY)
    backbone.set_adapter_state(POLICY, {key: value + 0.1 for key, value in state.items()})
    with torch.no_grad():
        policy, none = sequence_logps(backbone, collate(groups, layout=layout)).chunk(2)
    torch.testing.assert_close(none, expected, rtol=0, atol=1e-4)
    assert (policy - none).abs().max() > 0.1


def test_gradients_are_pefts(folder: Path) -> None:
    backbone, _ = started(folder, folder / "sft")
    backbone.train()
    trees = make_trees(5, 2)
    weights = torch.randn(2 * len(by_peft(folder, folder / "sft", trees)))
    logps = sequence_logps(backbone, collate([(POLICY, trees), (None, trees)], layout="packed"))
    (weights * logps).sum().backward()
    found = {
        name.removeprefix("model.").replace(f".{POLICY}.", "."): cast(Tensor, p.grad)
        for name, p in backbone.policy_parameters().items()
    }
    assert not any(p.grad is not None for n, p in backbone.named_parameters() if ".start." in n)
    peft = cast(Any, PeftModel.from_pretrained)(
        plain(folder / "model"), str(folder / "sft"), is_trainable=True
    ).eval()
    (weights[: len(weights) // 2] * plain_logps(peft, trees)).sum().backward()
    expected = {
        name.replace(".default.", "."): cast(Tensor, p.grad)
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    assert relative(found, expected) < 1e-5


def test_sampling_and_scores_are_those_of_both(folder: Path, tmp_path: Path) -> None:
    backbone, _ = started(folder, folder / "sft")
    verdict = verify(backbone, POLICY, longest=40)
    assert (verdict.packed, verdict.joint, verdict.slots) == ("", "", "")
    prompt = make_trees(1, 3)[0].prompt
    (answer,) = decode(
        backbone,
        [Request(prompt, {None: 1.0}, 12, None)],
        stop_ids=frozenset({1}),
        config=SamplingConfig(),
    )
    peft = PeftModel.from_pretrained(plain(folder / "model"), str(folder / "sft")).eval()
    ids = torch.from_numpy(prompt).long()[None]
    for token in answer.tokens:  # greedy
        with torch.no_grad():
            assert int(cast(Any, peft)(input_ids=ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert ids.shape[1] > len(prompt) + 1
    # Log-probs are cached by a hash of both.
    trees, cache = make_trees(3, 4), ReferenceCache()
    score(backbone, cache, [None], trees, 2)
    alone, _ = load_base(str(folder / "model"), dtype="fp32", device=CPU)
    assert cache.missing(alone.adapter_ids[None], trees)
    assert not cache.missing(started(folder, folder / "sft")[0].adapter_ids[None], trees)
    other, _ = started(folder, adapt(tmp_path / "sft", folder / "model", lora_alpha=10))
    assert cache.missing(other.adapter_ids[None], trees)


@pytest.mark.parametrize("order", [1, -1])
def test_experts_have_it_too(tmp_path: Path, order: int) -> None:
    save(tmp_path / "model", "qwen3_moe", FAMILIES["qwen3_moe"][1])
    names = ["experts.gate_up_proj", "experts.down_proj"][::order]
    changes = {"target_parameters": names, "lora_dropout": 0.0}
    sft = adapt(tmp_path / "sft", tmp_path / "model", target_modules=["q_proj"], **changes)
    backbone, _ = started(tmp_path, sft)
    trees = make_trees(4, 6)
    with torch.no_grad():
        found = sequence_logps(backbone, collate([(POLICY, trees), (None, trees)], layout="packed"))
    expected = by_peft(tmp_path, sft, trees)
    torch.testing.assert_close(found, torch.cat([expected, expected]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_servers_load_it(folder: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = started(folder, folder / "sft")
    config = SamplingConfig(engine=engine, url="http://localhost/v1", model="served")
    server, sent = ServerSampler(config, cast(Any, None)), list[dict[str, str]]()
    monkeypatch.setattr(server._client, "send", lambda url, body, *_, **__: sent.append(body))
    name = f"alphaspin-{backbone.adapter_ids[None][:16]}"
    assert server._served(backbone, None).removeprefix("served:") == name
    assert sent == [{"lora_name": name, "lora_path": str((folder / "sft").resolve())}]


def command(folder: Path, run: Path, **changes: str) -> list[str]:
    words = settings(folder, run, **{"lora.start": str(folder / "sft"), **changes})
    return [word for word in words if not word.startswith("--lora.r=")]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    assert finish(command(folder, folder / "whole"), folder / "log") == 0, (
        folder / "log"
    ).read_text()
    return folder / "whole"


def test_a_run_starts_from_it(folder: Path, whole: Path) -> None:
    sft = folder / "sft"
    played = Played.open(whole)
    assert (played.config.lora.r, played.config.lora.alpha) == (3, 9.0)
    backbone, chat = played.load(CPU)
    heldout = played.heldout(chat)
    trees = [Tree(demo.prompt, (demo.response,)) for demo in heldout]
    expected = -float(by_peft(folder, sft, trees).mean())
    with torch.no_grad():
        alone = -float(plain_logps(plain(folder / "model"), trees).mean())
    rows = json.loads((whole / "summary.json").read_text())["rows"]
    assert abs(rows[0]["nll"] - expected) < 1e-4 < 1e-2 < abs(alone - expected)
    # Iterates are adapters of the original base, which moved from the user's a little.
    for place in ("iterations/0", "iterations/1", "control/sft/0"):
        state, old = load_file(whole / place / "adapter" / WEIGHTS), load_file(sft / WEIGHTS)
        assert state.keys() == old.keys()
        moved = max(float((state[key] - old[key]).abs().max()) for key in old)
        assert 0 < moved < 0.05
        PeftModel.from_pretrained(plain(folder / "model"), str(whole / place / "adapter"))
    # Without the user's folder the run's own copy serves.
    found = sequence_logps(backbone.eval(), collate([(None, trees)], layout=backbone.layout))
    torch.testing.assert_close(found.detach(), by_peft(folder, sft, trees), rtol=0, atol=1e-4)
    copy = whole / "start/adapter"
    assert (copy / WEIGHTS).read_bytes() == (sft / WEIGHTS).read_bytes()


@pytest.mark.parametrize("event", [("sampling", 3), ("training", 2), ("saving", 6)])
def test_a_killed_run_goes_on(folder: Path, whole: Path, event: Any, tmp_path: Path) -> None:
    words = command(folder, tmp_path / "run")
    assert finish(words, tmp_path / "log", event) != 0
    assert finish(words, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert result(tmp_path / "run") == result(whole)


def test_another_adapter_is_another_run(folder: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    moved = Path(shutil.copytree(folder / "sft", tmp_path / "moved"))
    words = command(folder, run, **{"lora.start": str(moved)})
    assert finish(words, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    state = load_file(moved / WEIGHTS)
    save_file({key: value * 1.5 for key, value in state.items()}, moved / WEIGHTS)
    assert finish(words, tmp_path / "log") == EXIT_INPUT
    assert "holds another run: its config.lora.start is" in " ".join(
        (tmp_path / "log").read_text().split()
    )
    save_file(state, run / "start/adapter" / WEIGHTS)  # other bytes: no metadata
    with pytest.raises(InputError, match="damaged; restore it"):
        Played.open(run).load(CPU)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora: no DoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: one rank"),
        ({"layers_to_transform": [0]}, "layers_to_transform: name the modules"),
        ({"bias": "lora_only"}, "bias: no trained biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"target_modules": r".*\.q_proj"}, "is the pattern"),
        ({"task_type": "SEQ_CLS"}, "is LORA for SEQ_CLS"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: an iterate is a plain"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    sft = Path(shutil.copytree(folder / "sft", tmp_path / "sft"))
    file = sft / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError) as error:
        parse([f"--model={folder / 'model'}", f"--lora.start={sft}"])
    assert said in str(error.value) and "merge_and_unload" in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora.r=4"], "lora.r = 4: the adapter lora.start has 3"),
        (["--lora.targets", "all-linear"], "lora.start has ('down_proj', 'q_proj')"),
        (["--lora.use_rslora"], "lora.use_rslora = True: the adapter lora.start has False"),
        (["--lora.init_lora_weights=gaussian"], "no effect with lora.start"),
        (["--selfplay.opponent=mixture-gflownet"], "use mixture-smc"),
        (
            [
                *("--sampling.engine=transformers", "--sampling.model=x"),
                *("--sampling.url=http://localhost/v1", "--selfplay.iterations=1"),
            ],
            "`transformers serve` has none",
        ),
        (["--sampling.engine=vllm"], "an engine of the run's own is not yet given it"),
    ],
)
def test_settings_that_contradict_it_are_refused(folder: Path, words: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        parse([f"--lora.start={folder / 'sft'}", *words])
    assert said in " ".join(str(error.value).split())


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", hidden_size=16)
    sft = adapt(tmp_path / "sft", tmp_path / "model")
    with pytest.raises(InputError, match="is no adapter of this base"):
        started(folder, sft)
    with pytest.raises(InputError, match="has no adapter_config"):
        parse([f"--lora.start={tmp_path / 'model'}"])
