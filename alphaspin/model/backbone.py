"""One frozen base, many LoRA adapters: rows of a batch are routed to adapters, or to none.

The policy, its predecessors and the base differ by a low-rank update of the same weights, so one
pass reads the frozen weights once for all of them: y = W x, and then, for the rows of each adapter
only, y += (alpha / r) B A x. The adapters are PEFT's, in memory and on disk; only the layer's
forward pass is ours.

One class, and so one long file, since all of it shares one state: transformers' model with PEFT's
layers in it. What can be said without it is in `routing`, `layers`, `head` and `layout`.
"""

import copy
import hashlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alphaspin.errors import InputError
from alphaspin.foundation import rng
from alphaspin.foundation.artefacts import file_hash
from alphaspin.model import layers, varlen
from alphaspin.model.attention import TREES
from alphaspin.model.batching import Batch, Segment
from alphaspin.model.head import head_product, numbers, scale_and_cap
from alphaspin.model.layout import pin_positions, why_not_joint, why_not_packed
from alphaspin.model.repeatable import lenient
from alphaspin.model.routing import (
    NOT_JOINT,
    POLICY,
    START,
    Route,
    RoutedLinear,
    is_routable,
    linear_modules,
    peft_targets,
    route_parameters,
    target_modules,
    target_parameters,
)
from alphaspin.model.settings import NOT_HERE, LoraConfig

COPIES = 2**30
"""Of weights with an adapter, at most: in layers that large the update costs next to nothing."""
EXACT = (torch.float32, torch.float64)
PREFIX = "base_model.model."  # PEFT's, before a module's own name
WEIGHTS = "adapter_model.safetensors"


class Backbone(nn.Module):
    """The frozen base with its adapters; a forward pass gives the hidden states that predict."""

    layout: Literal["packed", "padded"]
    """How its tokens are laid out: what `collate` takes."""
    layout_reason: str
    """Why it is not `packed`, where it is not."""
    whole_reason = ""
    """Why the last layer computes all of all tokens, where it does (see `batching`)."""
    cache: Literal["graphs", "slots", "own", "none"]
    """What the sampler keeps of a sequence: keys and values in slots of ours (with CUDA graphs for
    its steps), the family's own cache, or nothing but its tokens (see `caches`)."""
    cache_reason = ""
    """Why it is not what its layout would have, where that was found to be wrong."""
    scale: float
    """The logits are scale · (W h + b), and soft-capped after that."""
    softcap: float | None = None
    """They become softcap · tanh(logits / softcap)."""

    def __init__(
        self, model: PreTrainedModel, path: str, identity: str, *, longest: int | None = None
    ):
        """Freeze `model` and find out how this project can serve it.

        Args:
            model: a causal language model as transformers loads it.
            path: folder or hub id it came from, recorded in the adapters.
            identity: hash of its weights.
            longest: tokens of the longest sequence; decides the frequencies of position embeddings
                that depend on it. By default as long as the model can.

        Raises:
            InputError: the model's head is of a kind that is not supported.
        """
        super().__init__()
        self.path = path
        self.identity = identity
        self.route = Route()
        self.adapter_ids: dict[str | None, str] = {None: identity}
        self.adapter_folders: dict[str, Path] = {}  # of those that are as on disk
        config: Any = model.config.get_text_config()
        self.layer_types: set[str] = set(getattr(config, "layer_types", None) or ())
        self.window: int | None = getattr(config, "sliding_window", None)
        self.eager: bool = config._attn_implementation == "eager"
        self.pinned, self.max_positions = pin_positions(
            model, longest, getattr(config, "max_position_embeddings", None), path
        )
        stops = getattr(model.generation_config, "eos_token_id", None)
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        self.stop_ids = tuple(cast(list[int], stops))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # noise belongs on the adapter alone (`lora.dropout`)
        for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
            if getattr(config, name, 0):
                setattr(config, name, 0.0)
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                cast(Any, module).attention_dropout = 0.0
        model.requires_grad_(False)
        self.model: PreTrainedModel | PeftModel = model
        self._causal_lm = model
        self._joint: str | None = None  # '' where it can be
        self.eval()
        self._layers: list[nn.Module] = list(getattr(self.decoder, "layers", ()))
        for layer in self._layers:
            layer.forward = partial(layers.run, self, layer, layer is self._layers[-1])
        self._takes = set(inspect.signature(self.decoder.forward).parameters)
        few = torch.from_numpy(np.resize(self.ordinary_tokens, 8)).long().to(self.device)[None]
        self.scale, self.softcap = scale_and_cap(model, few, self.plain_hidden, path)
        if getattr(model, "is_quantized", False):
            self.whole_reason = "its weights would be dequantised twice"
        self.layout_reason = why_not_packed(self)
        self.layout = "padded" if self.layout_reason else "packed"
        slots = "graphs" if self.device.type == "cuda" else "slots"
        self.cache = slots if self.layout == "packed" else "own"

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.head.weight.device

    @property
    def head(self) -> nn.Linear:
        """The language-model head, weight [V, H]."""
        return cast(nn.Linear, self._causal_lm.get_output_embeddings())

    @property
    def decoder(self) -> nn.Module:
        """The transformer below the head."""
        found = cast(nn.Module, self._causal_lm.get_decoder())
        # Llama 4's is not found by transformers, which then returns the whole.
        return cast(nn.Module, cast(Any, found).model) if found is self._causal_lm else found

    @property
    def ordinary_tokens(self) -> NDArray[np.int32]:
        """Ids that the configuration does not name: others may stand for an image or a sound."""
        named = {
            int(value)
            for key, value in numbers(self._causal_lm.config)
            if key.endswith(("token_id", "token_index"))
        }
        every = np.arange(self.head.weight.shape[0], dtype=np.int32)
        ordinary = every[~np.isin(every, list(named))]
        return ordinary if len(ordinary) else every

    @property
    def family(self) -> str:
        """What transformers calls this kind of model."""
        return self._causal_lm.config.model_type

    def plain_hidden(self, ids: Tensor) -> Tensor:
        """Hidden states [R, S, H] by the family's own code."""
        return cast(Any, self.decoder)(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Full logits [..., V] in fp32 (float64 of a float64 model): for sampling one position."""
        logits = head_product(self.head, hidden_NH)
        if self.scale != 1:
            logits *= self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def enable_activation_checkpointing(self) -> None:
        """Keep only each layer's input and recompute the rest in the backward pass."""
        model: Any = self._causal_lm
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.2x
        (enable or model.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": lambda: (nullcontext(), self._repeating())}
        )

    def _repeating(self) -> AbstractContextManager[None]:
        """For a layer's forward pass in the backward pass: tokens are routed as they are now."""
        route, then = self.route, (self.route.segments, self.route.seed)

        @contextmanager
        def again() -> Generator[None]:
            now = route.segments, route.seed
            route.segments, route.seed = then
            try:
                with self._attending_trees(), lenient():
                    yield
            finally:
                route.segments, route.seed = now

        return again()

    # Adapters

    def add_adapter(self, name: str, config: LoraConfig, *, seed: int, iteration: int) -> None:
        """Create a fresh adapter, whose update is zero (B = 0, A random from (seed, t)).

        After `start_from` it is a copy of that one.

        Raises:
            InputError: `lora.targets` or `lora.target_parameters` names nothing in this model, or
                what cannot have adapters here.
        """
        target_parameters(self._causal_lm, config.target_parameters)
        targets = list(config.targets)
        chosen = target_modules(self._causal_lm, config.targets)
        if targets == ["all-linear"]:
            targets = peft_targets(self._causal_lm, chosen)
        peft_config = PeftLoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - any number works
            lora_dropout=config.dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=True if config.init_lora_weights == "default" else "gaussian",
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            target_parameters=list(config.target_parameters) or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen),
            task_type="CAUSAL_LM",
        )
        self._inject(name, peft_config, rng.key(seed, iteration, "adapter") % 2**63)
        # What cannot be read back is not trained.
        self._fill(name, self.adapter_state(self.route.start or name))

    def start_from(self, folder: Path, config: LoraConfig) -> None:
        """From here on None is the base with the adapter in `folder`, whose form is `config`.

        Raises:
            InputError: it is an adapter of other layers.
        """
        self.add_adapter(START, config, seed=0, iteration=0)
        state = load_file(folder / WEIGHTS, device=str(self.device))
        wanted = {key: value.shape for key, value in self.adapter_state(START).items()}
        found = {key: value.shape for key, value in state.items()}
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                has, needs = (
                    [*sides[key]] if key in sides else "none" for sides in (found, wanted)
                )
                raise InputError(
                    f"lora.start = {folder}: is no adapter of this base: {key} is {has} there, and "
                    f"for the base it would be {needs}"
                )
        self._fill(START, state)
        self.route.start = START
        whole = f"{self.identity} {file_hash(folder / WEIGHTS)} {config.scaling}"
        self.adapter_ids[None] = hashlib.sha256(whole.encode()).hexdigest()
        self.adapter_folders[START] = folder

    def _inject(self, name: str, config: PeftLoraConfig, seed: int) -> None:
        config._register_custom_module({nn.Linear: RoutedLinear, Conv1D: RoutedLinear})
        head = self.head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                if isinstance(self.model, PeftModel):
                    self.model.add_adapter(name, config)
                else:
                    with warnings.catch_warnings():
                        # It renames the base in our configuration to the model's own (empty) name.
                        warnings.filterwarnings("ignore", message=".*base_model_name_or_path")
                        self.model = get_peft_model(self._causal_lm, config, adapter_name=name)
                config.base_model_name_or_path = self.path
            except ValueError as error:
                raise InputError(f"lora.targets = {config.target_modules!r}: {error}") from None
        # PEFT keeps a set, whose order in `adapter_config.json` would differ between processes.
        config.target_modules = sorted(cast(set[str], config.target_modules))
        if config.target_parameters:
            config.target_parameters = sorted(config.target_parameters)
        if self.head is not head:
            raise InputError(
                f"lora.targets = {config.target_modules!r} puts an adapter on the head, which "
                "all policies share; leave it out"
            )
        numbers = itertools.count()  # of these layers alone: the same whatever else is loaded
        for module_name, layer in self.model.named_modules():
            if isinstance(layer, RoutedLinear):
                layer.route = self.route
                layer.number, layer.name = next(numbers), module_name.removeprefix(PREFIX)
                routable = is_routable(layer.get_base_layer())
            elif isinstance(layer, ParamWrapper):
                route_parameters(layer, self.route)
                routable = True
            else:
                routable = not isinstance(layer, BaseTunerLayer)
            if not routable:
                kind = type(cast(Any, layer).get_base_layer()).__name__
                works = sorted({n.rsplit(".", 1)[-1] for n in linear_modules(self._causal_lm)})
                raise InputError(
                    f"lora.targets: {module_name} is a {kind}; only layers that compute W x + b "
                    "and nothing else can carry the adapters of several policies. all-linear "
                    f"takes just these; by name: {' '.join(works)}"
                )
        self._train_the_policy()

    def _train_the_policy(self) -> None:
        for key, parameter in self.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in key)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load PEFT files under `name`; an adapter already there is overwritten.

        Raises:
            InputError: it is no plain LoRA adapter.
        """
        config = cast(PeftLoraConfig, PeftLoraConfig.from_pretrained(str(folder)))
        for key in ("use_dora", "modules_to_save", "lora_bias", "rank_pattern", "alpha_pattern"):
            if getattr(config, key):
                raise InputError(f"{folder}: its {key}: {NOT_HERE[f'lora.{key}']}")
        if config.bias != "none":
            raise InputError(f"{folder}: its bias: {NOT_HERE['lora.bias']}")
        if not self.has_adapter(name):
            self._inject(name, config, seed=0)
        self._fill(name, load_file(folder / WEIGHTS, device=str(self.device)))
        self.adapter_ids[name] = file_hash(folder / WEIGHTS)
        self.adapter_folders[name] = folder

    def _fill(self, name: str, state: dict[str, Tensor]) -> None:
        result = set_peft_model_state_dict(self._peft, state, adapter_name=name)
        if result.unexpected_keys:
            layer = min(result.unexpected_keys).removeprefix(PREFIX).split(".lora_")[0]
            raise InputError(
                f"PEFT does not read back the adapter of {layer}; leave it out of lora.targets"
            )

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write PEFT's `adapter_model.safetensors` and `adapter_config.json`."""
        save_file(self.adapter_state(name), folder / WEIGHTS, metadata={"format": "pt"})
        config = self._peft.peft_config[name]
        inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = inference

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Copies of the adapter's tensors under PEFT's names, contiguous, on the CPU."""
        state = get_peft_model_state_dict(
            self._peft, adapter_name=name, save_embedding_layers=False
        )
        # On the CPU `.cpu()` alone would be the live parameter.
        return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}

    def set_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Overwrite an adapter's tensors; it then has no identity until saved and loaded."""
        self._fill(name, state)
        self.adapter_ids.pop(name, None)
        self.adapter_folders.pop(name, None)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was active which is now deleted")
            self._peft.delete_adapter(name)
        self.adapter_ids.pop(name, None)
        self.adapter_folders.pop(name, None)

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter of this name is loaded."""
        return isinstance(self.model, PeftModel) and name in self.model.peft_config

    def peft_config(self, name: str) -> PeftLoraConfig:
        """PEFT's configuration of an adapter."""
        return cast(PeftLoraConfig, self._peft.peft_config[name])

    def random_adapter(self, name: str, like: str, seed: int) -> None:
        """Add an adapter of the form of `like` that moves each output by about a sixth."""
        self._inject(name, copy.deepcopy(self.peft_config(like)), seed)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.model.modules():
            if isinstance(layer, RoutedLinear | ParamWrapper) and name in layer.lora_B:
                weight = cast(nn.Linear, layer.lora_B[name]).weight
                size = 0.3 / (layer.r[name] ** 0.5 * cast(float, layer.scaling[name]))
                with torch.no_grad():
                    weight.copy_(size * torch.randn(weight.shape, generator=generator))

    @contextmanager
    def plain(self, name: str | None) -> Generator[Callable[[Tensor, int | None], Tensor]]:
        """Passes of transformers and PEFT alone under one adapter.

        The function takes token ids [R, S] and gives hidden states [R, S, H]; with a seed, each
        adapted module's output is off by one rounding.
        """
        route, active = self.route, self._peft.active_adapter
        name = name or route.start

        def hidden_of(ids_RS: Tensor, seed: int | None) -> Tensor:
            route.rounding = (
                None if seed is None else torch.Generator(self.device).manual_seed(seed)
            )
            return self.plain_hidden(ids_RS)

        with nullcontext() if name else self._peft.disable_adapter():
            if name:
                self._peft.set_adapter(name)
            route.plain = True
            try:
                yield hidden_of
            finally:
                route.plain, route.rounding = False, None
                self._peft.set_adapter(cast(str, active))
                self._train_the_policy()

    @property
    def _peft(self) -> PeftModel:
        assert isinstance(self.model, PeftModel), "no adapter yet"
        return self.model

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's parameters by name: all that is ever trained.

        Who has them may change them: it has no identity until it is saved and loaded.
        """
        self.adapter_ids.pop(POLICY, None)
        self.adapter_folders.pop(POLICY, None)
        return {n: p for n, p in self.named_parameters() if f".{POLICY}." in n}

    # Forward passes

    def train(self, mode: bool = True) -> Self:
        """As of any module, at little cost where nothing changes: each step asks for it."""
        changes = any(module.training != mode for module in self.modules())
        return super().train(mode) if changes else self

    def forward(self, batch: Batch, beside: Batch | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states that predict the targets.

        Args:
            batch: on the base's device; its segments cover all tokens.
            beside: packed like `batch`, of frozen policies: goes through each layer right after it,
                so that the layer's weights are gathered once for both, without a graph.

        Returns:
            hidden_NH: [N, H] in the base's dtype, of each prediction; with `beside`, that and the
            same for it.
        """
        if beside is not None and not self._layers:
            raise InputError(f"{NOT_JOINT}: its layers are not a list")
        if beside is not None and batch.places is None:
            raise InputError(f"{NOT_JOINT}: it takes one sequence a row")
        route = self.route
        route.segments, route.batch, route.beside = batch.segments, batch, beside
        if any(segment.adapter == POLICY for segment in batch.segments):
            route.seed = int(torch.randint(2**62, ()))  # no draw for policies without noise
        ids, position_ids = batch.input_ids, batch.position_ids
        if batch.places is None:
            return self._padded(batch)
        if getattr(self, "layout_reason", ""):
            raise InputError(
                f"{self.path}: train.layout = packed is not for this model family, whose layers "
                f"take one sequence a row (train.layout = padded): {self.layout_reason}"
            )
        if beside is not None:
            assert beside.places is not None, "packed"
            ids = torch.cat([ids, beside.input_ids], 1)
            position_ids = torch.cat([position_ids, beside.position_ids], 1)
        try:
            with self._attending_trees():
                output = cast(Any, self.decoder)(
                    input_ids=ids, position_ids=position_ids, use_cache=False, places=batch.places
                )
        finally:
            route.segments, route.beside = batch.segments, None
            route.dequantised, route.inside = None, False
        hidden_TH = cast(Tensor, output.last_hidden_state).flatten(0, 1)
        if beside is None:
            return hidden_TH[batch.source]
        tokens = batch.input_ids.numel()
        return hidden_TH[batch.source], hidden_TH.detach()[tokens + beside.source]

    def _padded(self, batch: Batch) -> Tensor:
        """The same of rows that are one sequence each, by the family's own code.

        What follows a sequence in its row is never seen by it, so that no mask is needed, whatever
        mixes the tokens: attention, a convolution, a state.
        """
        return self._rows(batch.input_ids).flatten(0, 1)[batch.source]

    def plain_rows(self, segments: Sequence[Segment], ids_RS: Tensor) -> Tensor:
        """Hidden states [R, S, H] of one sequence a row; `segments` cover all rows."""
        self.route.segments = tuple(segments)
        return self._rows(ids_RS)

    def _rows(self, ids_RS: Tensor) -> Tensor:
        return self._run(ids_RS, 0, use_cache=False).last_hidden_state

    def _run(self, ids_RS: Tensor, start: int, **kwargs: Any) -> Any:
        """The decoder's output for rows that begin at position `start`."""
        if "position_ids" in self._takes:
            order_S = torch.arange(start, start + ids_RS.shape[1], device=ids_RS.device)
            kwargs["position_ids"] = order_S.expand(ids_RS.shape)
        return cast(Any, self.decoder)(input_ids=ids_RS, **kwargs)

    def own_cache_rows(
        self, segments: Sequence[Segment], ids_RS: Tensor, *, start: int = 0, cache: Any = None
    ) -> tuple[Tensor, Any]:
        """Hidden states [R, S, H] of rows that go on at position `start`, with the family's cache.

        Args:
            segments: cover all rows.
            ids_RS: token ids, the same number in each row.
            start: tokens that the cache holds of each row.
            cache: what the last call returned, None at position 0.
        """
        self.route.segments = tuple(segments)
        given = {} if cache is None else {self.cache_name: cache}
        output = self._run(ids_RS, start, use_cache=True, **given)
        return output.last_hidden_state, getattr(output, self.cache_name)

    @property
    def cache_name(self) -> str:
        """What the decoder calls its cache: `past_key_values` before transformers 5.24, or so."""
        names = ("cache", "past_key_values", "cache_params")
        return next((name for name in names if name in self._takes), names[0])

    def masks(self, seen: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
        """An attention mask in the form this family takes: one, or one per type of layer.

        Args:
            seen: for a sliding window (None: no window), who sees whom, [R, 1, S, K] bool.
        """

        def mask(window: int | None) -> Tensor:
            if not self.eager:
                return seen(window)
            dtype = self.head.weight.dtype
            closed_RSK = ~seen(window)
            zeros_RSK = torch.zeros(closed_RSK.shape, dtype=dtype, device=closed_RSK.device)
            return zeros_RSK.masked_fill(closed_RSK, torch.finfo(dtype).min)

        if not self.layer_types:  # Llama, Mistral, Gemma 1: the same mask everywhere
            return mask(self.window)
        windows = {"full_attention": None, "sliding_attention": self.window}
        return {kind: mask(windows[kind]) for kind in sorted(self.layer_types)}

    def notes(self) -> list[str]:
        """What a user should know of how this model is served, a sentence each."""
        found: list[str] = []
        if self.layout_reason:
            found.append(
                f"padded rows, one sequence each, slower than packed: {self.layout_reason}"
            )
        elif self.whole_reason:
            found.append(f"the whole last layer for all tokens: {self.whole_reason}")
        if self.layout == "packed":
            found.extend(
                f"attention, scoring and training: {way}" for way in varlen.on(self.device)
            )
        if self.cache_reason:
            instead = {
                "slots": "a launch for each kernel",
                "own": "the family's own cache",
                "none": "each of its tokens",
            }[self.cache]
            found.append(f"answers with {instead}, which is slower: {self.cache_reason}")
        if self.pinned:
            found.append(
                f"position embeddings with the frequencies for {self.pinned} tokens (text.max_*), "
                "as vLLM's --max-model-len has them"
            )
        return found

    def use_layout(self, wanted: Literal["auto", "packed", "padded"]) -> None:
        """Follow `train.layout`.

        Raises:
            InputError: packed, and the family cannot.
        """
        if wanted == "packed" and self.layout_reason:
            raise InputError(
                "train.layout = packed: not for this model, take auto or padded: "
                f"{self.layout_reason}"
            )
        if wanted != "auto":
            self.layout = wanted

    def forbid_joint(self, reason: str) -> None:
        """From here on `joint_problem` is this."""
        self._joint = f"{NOT_JOINT}: {reason}"

    def joint_problem(self) -> str | None:
        """None, or why the policy and its references cannot go through each layer together."""
        if self._joint is None and self.layout != "packed":
            self.forbid_joint(self.layout_reason or "train.layout is not packed")
        if self._joint is None:
            training = self.training
            with torch.random.fork_rng(devices=[]):
                policy = POLICY if self.has_adapter(POLICY) else None
                self._joint = why_not_joint(self.eval(), policy)
            self.train(training)
        return self._joint or None

    def routed(self, segments: Sequence[Segment]) -> Any:
        """The decoder, for code that calls it itself (sampling); `segments` cover all rows."""
        self.route.segments = tuple(segments)
        return self.decoder

    @contextmanager
    @torch.no_grad()
    def merged(self, name: str | None) -> Generator[None]:
        """Within, all passes are of one policy, and its update is added to the weights once.

        That saves two products a layer, and what calling them costs. Nothing is done where the
        weights have 16 bits, which would round the update away, or 4, where they are shared out
        among processes, or where their copies would take more than `COPIES` bytes.
        """
        layers = [m for m in self.model.modules() if isinstance(m, RoutedLinear)]
        weights = [cast(nn.Linear, m.base_layer).weight for m in layers]
        if (
            all(type(w) is nn.Parameter and w.dtype in EXACT for w in weights)
            and sum(w.numel() * w.element_size() for w in weights) <= COPIES
        ):
            self.route.merged = {layer.number: layer.with_update(name) for layer in layers}
        try:
            yield
        finally:
            self.route.merged = None

    @contextmanager
    def _attending_trees(self) -> Generator[None]:
        """Attention by `attention.attend` instead of the family's own choice."""
        config: Any = self._causal_lm.config
        usual, config._attn_implementation = config._attn_implementation, TREES
        try:
            yield
        finally:
            config._attn_implementation = usual


def average_adapters(
    old: dict[str, Tensor], new: dict[str, Tensor], decay: float
) -> dict[str, Tensor]:
    """decay · old + (1-decay) · new, tensor by tensor: the moving average of adapter weights."""
    return {key: decay * old[key] + (1 - decay) * new[key] for key in new}
