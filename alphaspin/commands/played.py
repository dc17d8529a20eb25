"""A run opened again from its folder alone, finished or not: settings, base, policies, all checked.

What is loaded is what the run was made of, or an error: base, tokenizer and held-out prompts are
compared with the hashes in the manifest, adapters with their own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from alphaspin.commands.inputs import load_data, load_heldout
from alphaspin.commands.job import OTHER_DAY, renewed
from alphaspin.commands.options import EvaluateOptions, ExportOptions
from alphaspin.commands.sizing import recorded_limits
from alphaspin.config import Config
from alphaspin.data.chat import ChatFormat
from alphaspin.data.demonstrations import Demonstration, fingerprint
from alphaspin.errors import InputError
from alphaspin.foundation.artefacts import EDITED, SEAL, fault, file_hash, read_manifest
from alphaspin.foundation.paths import check_there, refuse_links
from alphaspin.foundation.runs import clock, differences, relocated
from alphaspin.foundation.section import RECORDED
from alphaspin.model.backbone import WEIGHTS, Backbone
from alphaspin.model.load import load_base
from alphaspin.model.verify import Verdict
from alphaspin.schema import explain


@dataclass(frozen=True, slots=True)
class Policy:
    """The base, an iterate, or the control after as many steps."""

    name: str  # base, 0, 1, …, sft 0, sft 1, …
    iteration: int  # t; 0 for the base
    folder: Path  # holds its `adapter` and the run's own `evaluation`
    digest: str | None  # hash of its adapter's weights; None for the base

    def adapter(self) -> Path | None:
        """Folder of the adapter; None for the base.

        Raises:
            InputError: its files are not those that the run made.
        """
        if self.digest is None:
            return None
        folder = self.folder / "adapter"
        if wrong := fault(folder):
            raise InputError(f"{folder}: {wrong}; restore it")
        if (found := file_hash(folder / WEIGHTS)) != self.digest:
            raise InputError(
                f"{folder / WEIGHTS}: is not the adapter that this run made ({found[:12]} on disk, "
                f"{self.digest[:12]} in the manifest); restore it"
            )
        return folder


@dataclass(frozen=True, slots=True)
class Played:
    """What a run folder says of itself."""

    path: Path
    config: Config
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Played":
        """Read the manifest.

        Raises:
            InputError: there is none, it is damaged, or it has no settings.
        """
        file = path / "manifest.json"
        if not file.is_file():
            raise InputError(f"{path}: is no run folder (it has no manifest.json)")
        refuse_links(path)
        manifest = read_manifest(file)
        if "config" not in manifest:
            raise InputError(
                f"{file}: has no `config`, as runs of earlier versions; the command that made the "
                "run adds it"
            )
        try:
            config = Config.model_validate(manifest["config"], context=RECORDED)
        except ValidationError as error:
            raise InputError(f"{file}: {explain(error, Config)}") from None
        config = config.sized(recorded_limits(path))
        known: dict[str, Any] = renewed(manifest["identity"])
        mine = json.loads(json.dumps({**known, "config": config.identity()}))
        if SEAL in manifest:
            for line in differences(known, relocated(mine, known)):
                raise InputError(f"{file}: {EDITED} (of what decides the result {line})")
        return cls(path, config, manifest)

    def moved(self, options: EvaluateOptions | ExportOptions) -> "Played":
        """The same run, with base and data where the options say that they are now."""
        found = options.model_dump(include={"model", "data"}, exclude_none=True)
        return replace(self, config=self.config.model_copy(update=found))

    def _check_there(self, key: str, hint: str) -> None:
        """Whether the base or the data, if they are files, are where they were.

        Raises:
            InputError: they are not; says where they were, and what helps.
        """
        name, typed = getattr(self.config, key), self.manifest["config"][key]
        if not Path(typed).is_absolute():  # as versions before absolute paths kept them
            hint = f", seen from the folder in which the run was started{hint}"
        check_there(key, name, hint)
        # Of a path of those versions nothing tells it from a hub id but the hash.
        local = key == "model" and "@" not in self.manifest["identity"]["base"]
        if local and name != "tiny" and not Path(name).exists():
            raise InputError(f"{key} = {name}: no such folder{hint}")

    def policies(self, iterations: Sequence[int] | None = None) -> list[Policy]:
        """The base, the finished iterates, then the finished steps of the control.

        Args:
            iterations: t of those that are wanted; None for all.

        Raises:
            InputError: one is not finished.
        """
        folders = {"train": ("", "iterations"), "control": ("sft ", "control/sft")}
        found: list[Policy] = []
        for stage, digest in self.manifest["adapters"].items():
            kind, _, t = stage.partition("/")
            if kind in folders:
                if not t.isdecimal():  # not a way to other folders
                    raise InputError(f"{self.path / 'manifest.json'}: damaged at adapter {stage!r}")
                prefix, folder = folders[kind]
                found.append(Policy(prefix + t, int(t), self.path / folder / t, digest))
        found.sort(key=lambda policy: (" " in policy.name, policy.iteration))
        done = [policy.iteration for policy in found if " " not in policy.name]
        for t in iterations or ():
            if t not in done:
                have = f"0 to {done[-1]}" if done else "none yet"
                raise InputError(f"iteration {t}: not finished in {self.path}; it has {have}")
        wanted = [p for p in found if iterations is None or p.iteration in iterations]
        return [Policy("base", 0, self.path / "base", None), *wanted]

    def load(self, device: torch.device, *, whole: bool = False) -> tuple[Backbone, ChatFormat]:
        """The base, in the precision of the run, and the tokenizer with its template.

        Args:
            device: where the base goes.
            whole: the weights before they were rounded to 4 bits, where the run did that.

        Raises:
            InputError: it cannot be loaded, or is another than the run's.
        """
        identity, name = self.manifest["identity"], self.config.model
        dtype = "bf16" if identity["dtype"] == "torch.bfloat16" else "fp32"
        train = self.config.train
        self._check_there("model", "; where the base is now: --model FOLDER")
        backbone, tokenizer = load_base(
            name,
            dtype=dtype,
            device=device,
            quantization="none" if whole else train.quantization,
            liger=train.liger,
            longest=self.config.text.longest,
        )
        if digest := identity.get("start"):
            adapter = Policy("start", 0, self.path / "start", digest).adapter()
            assert adapter
            backbone.start_from(adapter, self.config.lora)
        if kept := Verdict.read(self.path):
            kept.apply(backbone)
        backbone.use_layout(train.layout)
        if backbone.identity != identity["base"]:
            raise InputError(
                f"model = {name}: is not the base of this run ({backbone.identity[:12]} here, "
                f"{identity['base'][:12]} in the manifest); restore it, or say where it is now: "
                "--model FOLDER"
            )
        text = self.config.text
        chat = ChatFormat.of(text, tokenizer, backbone.stop_ids, clock(self.path))
        if sorted(chat.stop_token_ids) != identity["end_tokens"]:
            raise InputError(
                f"model = {name}: end tokens {sorted(chat.stop_token_ids)}, in the run "
                f"{identity['end_tokens']}: tokenizer or text.template have changed; restore them"
            )
        return backbone, chat

    def heldout(self, chat: ChatFormat) -> list[Demonstration]:
        """The held-out demonstrations of the run.

        Raises:
            InputError: they are others than the run's, or not where they were.
        """
        config = self.config
        key = "heldout" if config.heldout else "data"
        there = (
            "--heldout FILE" if config.heldout else "--data FILE, or other prompts: --heldout FILE"
        )
        self._check_there(key, f"; where they are now: {there}")
        if config.heldout:
            found = load_heldout(config, chat, config.heldout)[: config.evaluate.prompts]
        else:
            found = load_data(config, chat)[1]
        if fingerprint(found) != self.manifest["identity"]["heldout"]:
            source = f"{key} = {getattr(config, key)}"
            hint = OTHER_DAY if chat.dates and "clock" not in self.manifest["identity"] else ""
            raise InputError(
                f"{source}: not the prompts that this run held out; restore the file, or: {there}"
                + hint
            )
        return found
