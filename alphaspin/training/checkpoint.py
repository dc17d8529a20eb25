"""Durable checkpoints: the adapter's and the optimiser's tensors, and what a loop keeps besides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaspin.foundation.artefacts import commit, remove, stands
from alphaspin.model.backbone import Backbone
from alphaspin.model.routing import POLICY


class Kept(Protocol):
    """What a loop keeps besides, in files of its own."""

    def save(self, folder: Path) -> None:
        """Into the folder of a checkpoint."""

    def load(self, folder: Path) -> None:
        """What `save` wrote."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors on the CPU, for safetensors."""
    # `state_dict` nests bitsandbytes' tensors, some of which its parameters share.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
        for number, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor | float]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        # bitsandbytes counts steps with a number, torch with a floating-point tensor.
        entry = value.item() if value.dtype == torch.int64 else value
        state.setdefault(int(number), {})[name] = entry
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    kept: Kept | None,
    folder: Path,
    step: int,
    made_of: Mapping[str, str],
) -> None:
    """A durable checkpoint; the one before it is deleted afterwards. `made_of` as in `Loop`."""
    older = list(folder.glob("step-*"))
    with commit(folder / f"step-{step:06d}", made_of) as temporary:
        backbone.save_adapter(POLICY, temporary)
        save_file(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        if kept is not None:  # an empty one is false
            kept.save(temporary)
    for path in older:
        if path.name != f"step-{step:06d}":
            remove(path)


def newest_checkpoint(folder: Path, made_of: Mapping[str, str]) -> int:
    """The step of the newest checkpoint that verifies and is made of the same, 0 without one."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if stands(path, made_of):
            return int(path.name.removeprefix("step-"))
    return 0


def load(
    backbone: Backbone, optimizer: torch.optim.Optimizer, kept: Kept | None, folder: Path, step: int
) -> None:
    """Read what `save` wrote."""
    path = folder / f"step-{step:06d}"
    backbone.load_adapter(POLICY, path)
    load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    if kept is not None:  # an empty one is false
        kept.load(path)
