"""The start-up check finds errors of adapters, at length and in caches, and changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FAMILIES, save

from alphaspin.errors import InputError
from alphaspin.model import attention, graphs, slots, verify
from alphaspin.model.backbone import Backbone
from alphaspin.model.load import load_base
from alphaspin.model.routing import POLICY, RoutedLinear
from alphaspin.model.settings import LoraConfig

LONGEST = 60


def ready(folder: Path, family: str = "llama", **changes: Any) -> Backbone:
    save(folder, family, FAMILIES[family][1] | changes if family in FAMILIES else changes)
    backbone, _ = load_base(str(folder), dtype="fp32", device=torch.device("cpu"), longest=LONGEST)
    backbone.add_adapter(POLICY, LoraConfig(r=4, alpha=6), seed=0, iteration=0)
    return backbone


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "gemma4_text", "lfm2", "bloom"])
def test_right_models_pass(family: str, tmp_path: Path) -> None:
    backbone = ready(tmp_path, family)
    before = (
        backbone.layout,
        backbone.cache,
        backbone.joint_problem(),
        backbone.adapter_state(POLICY),
    )
    torch.manual_seed(3)
    found = verify.verify(backbone, POLICY, longest=LONGEST)
    assert not (found.packed or found.last or found.joint or found.slots)
    if backbone.layout == "packed":  # Gemma 4's last layers look into those before them
        assert bool(backbone.whole_reason) == (family == "gemma4_text")
    assert torch.initial_seed() == 3 and int(torch.randint(2**62, ())) == draw_after_seed(3)
    after = (
        backbone.layout,
        backbone.cache,
        backbone.joint_problem(),
        backbone.adapter_state(POLICY),
    )
    assert before[:3] == after[:3]
    assert all(torch.equal(before[3][key], after[3][key]) for key in before[3])
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == {
        n for n, _ in backbone.named_parameters() if f".{POLICY}." in n
    }
    assert not any(backbone.has_adapter(name) for name in verify.NAMES)


def draw_after_seed(seed: int) -> int:
    return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))


def wrong_window(backbone: Backbone, patch: pytest.MonkeyPatch) -> None:
    """Only beyond 20 tokens: the trial at loading does not see it."""
    right = attention.causal

    def wrong(q: Any, k: Any, v: Any, limits: Any, *rest: Any) -> Any:
        return right(q, k, v, limits._replace(window=20), *rest)

    patch.setattr(attention, "causal", wrong)


def wrong_strength(backbone: Backbone, patch: pytest.MonkeyPatch) -> None:
    """An adapter of the wrong strength: the base is right."""
    right = RoutedLinear.forward

    def wrong(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.route.plain and "check-1" in self.scaling:
            self.scaling["check-1"] *= 1.01
            try:
                return right(self, x, *args, **kwargs)
            finally:
                self.scaling["check-1"] /= 1.01
        return right(self, x, *args, **kwargs)

    patch.setattr(RoutedLinear, "forward", wrong)


def stale_cache(backbone: Backbone, patch: pytest.MonkeyPatch) -> None:
    right = slots.SlotCache.update

    def wrong(self: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return right(self, key, value * (1.01 if value.shape[2] == 1 else 1), *args, **kwargs)

    patch.setattr(slots.SlotCache, "update", wrong)


def stale_graphs(backbone: Backbone, patch: pytest.MonkeyPatch) -> None:
    """Right when they are held against the pass itself, wrong after that."""
    backbone.cache = "graphs"

    def record(work: Any, pool: None) -> Any:
        calls: list[Any] = []

        def replay() -> Any:
            calls.append(work() if len(calls) < 1 else calls[-1])
            return calls[-1]

        return replay, pool

    patch.setattr(graphs, "record", record)


def wrong_last(backbone: Backbone, patch: pytest.MonkeyPatch) -> None:
    """Of tokens that are only seen the keys are those of others, beyond a few of them."""
    right = attention.Places.asking

    def wrong(self: Any, seen: Any, asking: Any) -> Any:
        return right(self, seen.flip(0) if len(seen) > 20 else seen, asking)

    patch.setattr(attention.Places, "asking", wrong)


def wrong_joint(backbone: Backbone, patch: pytest.MonkeyPatch) -> None:
    for layer in backbone._layers:
        right = layer.forward

        def wrong(*args: Any, right: Any = right, **kwargs: Any) -> Any:
            found = right(*args, **kwargs)
            return found if backbone.route.beside is None else 1.01 * found

        patch.setattr(layer, "forward", wrong)


@pytest.mark.parametrize(
    ("fault", "finds"),
    [
        (wrong_window, "packed"),
        (wrong_last, "last"),
        (stale_cache, "slots"),
        (stale_graphs, "graphs"),
        (wrong_joint, "joint"),
    ],
)
def test_a_wrong_way_is_found_and_replaced(
    fault: Callable[..., None], finds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = ready(tmp_path)
    assert backbone.layout == "packed" and backbone.joint_problem() is None
    fault(backbone, monkeypatch)
    found = verify.verify(backbone, POLICY, longest=LONGEST)
    kinds = ("packed", "last", "joint", "graphs", "slots")
    reasons = {kind: getattr(found, kind) for kind in kinds}
    implied = {"packed", "joint", "graphs", "slots"} if finds == "packed" else {finds}
    assert {name for name, reason in reasons.items() if reason} == implied
    assert "nats a token, where rounding in this dtype explains" in reasons[finds]
    if finds == "packed":
        assert (backbone.layout, backbone.cache) == ("padded", "own")
        with pytest.raises(InputError, match="take auto or padded"):
            backbone.use_layout("packed")
    elif finds == "last":
        assert backbone.layout == "packed" and backbone.joint_problem() is None
        assert any("the whole last layer for all tokens" in note for note in backbone.notes())
        assert not verify.verify(backbone, POLICY, longest=LONGEST).last  # used no more
    elif finds == "graphs":
        assert backbone.cache == "slots"
        assert any("a launch for each kernel" in note for note in backbone.notes())
    elif finds == "slots":
        assert backbone.cache == "own"
        assert any("answers with the family's own cache" in note for note in backbone.notes())
    else:
        assert "use cached or online" in str(backbone.joint_problem())


def test_what_is_wrong_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = ready(tmp_path)
    right, calls = verify._Trial._sampled, list[int]()

    def jumps(self: Any) -> Any:
        found = right(self)
        if not calls:
            found[0][0] += 1
        calls.append(len(calls))
        return found

    monkeypatch.setattr(verify._Trial, "_sampled", jumps)
    assert not verify.verify(backbone, POLICY, longest=LONGEST).slots
    assert len(calls) == 3  # by slots, by the own cache, and again by slots


def test_what_nothing_makes_right_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = ready(tmp_path)
    wrong_strength(backbone, monkeypatch)
    with pytest.raises(InputError, match=r"padded rows are not those .* of type llama"):
        verify.verify(backbone, POLICY, longest=LONGEST)
    assert not any(backbone.has_adapter(name) for name in verify.NAMES)


def test_a_verdict_is_kept_and_believed_for_the_same_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = ready(tmp_path)
    stale_cache(backbone, monkeypatch)
    found = verify.verify(backbone, POLICY, longest=LONGEST)
    found.keep(tmp_path)
    kept = verify.Verdict.read(tmp_path)
    assert kept == found

    def never(*args: Any) -> None:
        raise AssertionError("tried again")

    monkeypatch.undo()  # what is wrong at a few tokens is found when the model is loaded
    again, _ = load_base(str(tmp_path), dtype="fp32", device=torch.device("cpu"))
    again.add_adapter(POLICY, LoraConfig(r=4, alpha=6), seed=0, iteration=0)
    monkeypatch.setattr(verify._Trial, "run", never)
    assert verify.verify(again, POLICY, longest=LONGEST, kept=kept) == found
    assert again.cache == "own"
    with pytest.raises(AssertionError, match="tried again"):
        verify.verify(again, POLICY, longest=LONGEST + 1, kept=kept)
