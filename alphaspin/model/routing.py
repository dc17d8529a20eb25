"""Layers whose tokens are routed to adapters, and which layers of a model can be such.

The adapters are PEFT's, in memory and on disk; only the layer's forward pass is ours: y = W x, and
then, for the rows of each adapter only, y += (alpha / r) B A x. Where an adapter belongs to a
parameter (the fused matrices of experts), its module runs once for each adapter.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast
from weakref import ref

import torch
from alphaspin_kernels import segmented_lora
from alphaspin_kernels.segmented_lora import rounds
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alphaspin.errors import InputError
from alphaspin.model.batching import Batch, Segment
from alphaspin.model.speedups import dequantise, is_quantised

POLICY = "policy"
START = "start"
STATE_SPACE = frozenset(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"))
"""Families of which PEFT 0.21 refuses `out_proj`."""
NOT_JOINT = "reference.mode = joint is not for this model family (use cached or online)"


class Route:
    """Which tokens of the batch in flight run under which adapter; one object for all layers.

    It stays in force until the next forward pass, because activation checkpointing runs layers
    again during the backward pass; so does `batch`. `seed` is that of the pass's dropout noise.
    `beside` is the batch of frozen policies that goes through each layer right after `batch`,
    `inside` whether a layer is at work on one of the two. `dequantised` holds the 4-bit weights, by
    the number of their layer, that `batch` has used and `beside` is to use. `plain` leaves
    everything to PEFT's active adapter, with `rounding`, if there is one, adding errors of one
    rounding to each output.
    `start` is the adapter, if any, that belongs to the base: segments of no other run under it.
    `merged` are weights, by the number of their layer, in which the one policy of all tokens is.
    """

    segments: tuple[Segment, ...] = ()
    seed: int = 0
    batch: Batch | None = None
    beside: Batch | None = None
    inside: bool = False
    dequantised: dict[int, Tensor] | None = None
    plain: bool = False
    start: str | None = None
    merged: dict[int, Tensor] | None = None
    rounding: torch.Generator | None = None

    def units(self, rows: int, name: str) -> int:
        """Of so many rows of a layer's input, how many are one of the segments' unit.

        Raises:
            InputError: a pass of several batches is outside of the layers, or the layer's input
                is not a row for each token.
        """
        if self.beside is not None and not self.inside:
            raise InputError(
                f"{NOT_JOINT}: an adapter lies outside of its layers, where the tokens of all "
                "policies pass together"
            )
        unit, rest = divmod(rows, self.segments[-1].stop)
        if rest:
            raise InputError(
                f"{name} takes {rows} rows for {self.segments[-1].stop} tokens or sequences: "
                "it cannot carry the adapters of several policies; leave it out of lora.targets"
            )
        return unit


class RoutedLinear(LoraLinear):
    """PEFT's LoRA layer with tokens routed to adapters, in training mode too."""

    route: Route
    name: str  # the module's
    number: int  # of this layer, so that each has noise of its own

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus, for each segment's tokens, that adapter's update.

        Args:
            x: [..., in], any floating dtype; the segments divide its tokens in proportion.
            args: not used, but by PEFT's own forward pass.
            kwargs: as `args`.

        Returns:
            [..., out], dtype of `x`.
        """
        if self.route.plain:
            return self._plain(super().forward(x, *args, **kwargs))
        if self.route.merged is not None:
            bias = cast(nn.Linear, self.base_layer).bias
            return nn.functional.linear(x, self.route.merged[self.number], bias)
        x_NI = x.reshape(-1, x.shape[-1])
        unit = self.route.units(len(x_NI), self.name)
        adapters: list[tuple[Tensor, Tensor] | None] = []
        near: list[tuple[Tensor, Tensor] | None] = []
        rounded = rounds(x_NI)
        counts: list[int] = []
        scaling: list[float] = []
        if self.route.segments[0].adapter != POLICY:  # what is trained comes first
            adapters, near, counts, scaling = [None], [None], [0], [0.0]
        for segment in self.route.segments:
            name = segment.adapter or self.route.start
            counts.append(unit * (segment.stop - segment.start))
            if name is None or name not in self.lora_A:
                adapters.append(None)
                near.append(None)
                scaling.append(0.0)
                continue
            layers = (self.lora_A[name], self.lora_B[name])
            down, up = (cast(nn.Linear, layer).weight for layer in layers)
            adapters.append((down, up))
            near.append(self._near(name, down, up, x.dtype) if rounded else None)
            scaling.append(cast(float, self.scaling[name]))
        # Noise is the policy's alone: earlier iterates were trained with it but do not play so.
        noise = self.lora_dropout[POLICY] if self.training and POLICY in self.lora_dropout else None
        base = cast(nn.Linear, self.base_layer)
        # GPT-2's Conv1D is a linear layer that keeps its weight the other way round.
        weight, again = base.weight.T if isinstance(base, Conv1D) else base.weight, None
        if is_quantised(base):
            again, shared = partial(dequantise, base), self.route.dequantised
            if shared is None:
                weight = again()
            elif self.number in shared:
                weight = shared.pop(self.number)
            else:
                weight = shared[self.number] = again()
        y_NO = segmented_lora(
            x_NI,
            weight,
            adapters,
            counts,
            scaling,
            bias=base.bias,
            dropout=noise.p if isinstance(noise, nn.Dropout) else 0.0,
            seed=self.route.seed + self.number,
            again=again,
            rounded=near if rounded else None,
        )
        return y_NO.view(*x.shape[:-1], -1)

    def with_update(self, name: str | None) -> Tensor:
        """W + (alpha / r) B A [O, I], in the dtype of W; W itself for the base."""
        base = cast(nn.Linear, self.base_layer)
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        name = name or self.route.start
        if name is None or name not in self.lora_A:
            return weight
        down, up = (cast(nn.Linear, of[name]).weight for of in (self.lora_A, self.lora_B))
        return torch.addmm(weight, up, down, alpha=cast(float, self.scaling[name]))

    def _near(
        self, name: str, down: Tensor, up: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The adapter in the base's dtype, rounded once for all calls until it changes."""
        kept: dict[str, Any] = vars(self).setdefault("rounded", {})
        state = (down._version, up._version, down.data_ptr(), up.data_ptr(), dtype)
        # An adapter of the same name, removed since, may have had the same memory.
        if name not in kept or kept[name][0]() is not down or kept[name][1] != state:
            for other in [n for n, (parameter, *_) in kept.items() if parameter() is None]:
                del kept[other]
            kept[name] = ref(down), state, (down.detach().to(dtype), up.detach().to(dtype))
        return kept[name][2]

    def _plain(self, y: Tensor) -> Tensor:
        """PEFT's output, moved by one rounding of its size where `Route.rounding` asks for it.

        Sums are made in fp32 whatever the dtype; one of many terms is off by several roundings.
        """
        if self.route.rounding is None:
            return y
        rounding = max(torch.finfo(y.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        size = rounding * y.float().square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(y.shape, generator=self.route.rounding, device=y.device)
        return y + (size * noise).to(y.dtype)


def route_parameters(layer: ParamWrapper, route: Route) -> None:
    """Let a module with adapters on its parameters run once for each segment, with its adapter."""
    # Not a class of its own: PEFT knows its wrappers by the name of their class.
    layer.forward = partial(_run_for_each, layer, route)


def _run_for_each(layer: ParamWrapper, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A module of experts on tokens [N, in] and what the router says of each, [N, ...]."""
    if route.plain:
        return type(layer).forward(layer, x, *args, **kwargs)
    beside = (*args, *kwargs.values())
    if not beside or any(not isinstance(v, Tensor) or len(v) != len(x) for v in beside):
        module = type(layer.get_base_layer()).__name__
        raise InputError(
            f"lora.target_parameters: {module} does not take a row for each token, with what the "
            "router says of it, and cannot be parted among several policies; leave it out"
        )
    wrappers, inner = [layer], layer.base_layer
    while isinstance(inner, ParamWrapper):
        wrappers.append(inner)
        inner = inner.base_layer
    unit, parts = route.units(len(x), type(inner).__name__), list[Tensor]()
    for segment in route.segments:
        span = slice(unit * segment.start, unit * segment.stop)
        with ExitStack() as stack:
            for wrapper in wrappers:
                stack.enter_context(wrapper._activate_lora([segment.adapter or route.start or ""]))
            mine = {key: value[span] for key, value in kwargs.items()}
            parts.append(inner(x[span], *(value[span] for value in args), **mine))
    return torch.cat(parts)


def is_routable(module: nn.Module) -> bool:
    """Whether a module is W x + b and nothing else.

    Subclasses of nn.Linear with a forward pass of their own (routers that return a tuple) are not,
    unless it is the same function written differently (Falcon's), which is tried at three scales;
    bitsandbytes' layer in 4 bits is.
    """
    if isinstance(module, RoutedLinear):
        module = module.get_base_layer()
    plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if plain or not isinstance(module, nn.Linear) or is_quantised(module):
        return plain or isinstance(module, nn.Linear)
    return not module.weight.is_meta and _computes_a_product(module)


@torch.no_grad()
def _computes_a_product(module: nn.Linear) -> bool:
    """Whether a module's output is W x + b for numbers small and large."""
    weight, generator = module.weight, torch.Generator().manual_seed(0)
    scale_31 = torch.tensor([[1e-3], [1.0], [1e3]])
    x_3I = (torch.randn(3, weight.shape[1], generator=generator) * scale_31).to(weight)
    try:
        found: Any = module(x_3I)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    expected_3O = nn.functional.linear(x_3I, weight, module.bias)
    if not isinstance(found, Tensor) or found.shape != expected_3O.shape:
        return False
    error_3 = (found - expected_3O).abs().amax(1) / expected_3O.abs().amax(1).clamp(min=1e-30)
    return bool((error_3 < 16 * torch.finfo(weight.dtype).eps).all())


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Those that `all-linear` means, by their names: all routable ones but the head.

    Neither what PEFT takes for a name of the fused experts beside it (a shared expert's
    projections), nor what it refuses in state-space models, whose kernels go round the layer.
    """
    head = cast(Any, model).get_output_embeddings()
    kind = getattr(getattr(model, "config", None), "model_type", None)
    left_out = {"out_proj", "conv1d"} if kind in STATE_SPACE else set[str]()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in name.split("."):
            left_out |= {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    return {
        name: module
        for name, module in _own_modules(model).items()
        if is_routable(module) and module is not head and name.rsplit(".", 1)[-1] not in left_out
    }


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules as they were before PEFT put layers of its own around some."""
    return {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in model.named_modules()
        if not any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))
    }


def peft_targets(model: nn.Module, chosen: Sequence[nn.Module]) -> list[str]:
    """`all-linear` for PEFT, or names where PEFT would take more by it than can be routed.

    The last part of a name where it names nothing else, the whole name otherwise.
    """
    wanted = {id(module) for module in chosen}
    names = _own_modules(model)
    others = {name.rsplit(".", 1)[-1] for name, module in names.items() if id(module) not in wanted}
    head = cast(Any, model).get_output_embeddings()
    linear = {id(m) for m in names.values() if isinstance(m, nn.Linear | Conv1D)} - {id(head)}
    fused = any("experts" in name.split(".") for name, p in model.named_parameters() if p.ndim == 3)
    if linear == wanted and not fused:
        return ["all-linear"]
    found = {n: n.rsplit(".", 1)[-1] for n, m in names.items() if id(m) in wanted}
    return sorted({name if last in others else last for name, last in found.items()})


def target_modules(model: nn.Module, targets: Sequence[str]) -> list[nn.Module]:
    """Modules that `lora.targets` names, by full name or its last parts, as PEFT matches them.

    Raises:
        InputError: a name that no module has; PEFT passes over one that stands beside a right one.
    """
    modules = dict(model.named_modules())
    if tuple(targets) == ("all-linear",):
        return list(linear_modules(model).values())
    found: dict[str, nn.Module] = {}
    for target in targets:
        named = {n: m for n, m in modules.items() if n == target or n.endswith(f".{target}")}
        if not named:
            raise InputError(
                f"lora.targets = {list(targets)!r}: no module of this model is called {target!r}"
            )
        found |= named
    return list(found.values())


def target_parameters(model: nn.Module, targets: Sequence[str]) -> list[nn.Parameter]:
    """Parameters that `lora.target_parameters` names, as PEFT matches them.

    Raises:
        InputError: a name that no parameter has, or one of a layer that `lora.targets` is for.
    """
    found: dict[str, nn.Parameter] = {}
    for target in targets:
        # PEFT's wrappers stand in the name as `base_layer` once there is an adapter.
        named: dict[str, nn.Parameter] = {}
        modules: dict[str, nn.Module] = {}
        fused: set[str] = set()
        for path, module in model.named_modules():
            for last, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{last}".replace(".base_layer", "")
                if name == target or name.endswith(f".{target}"):
                    named[name], modules[name] = parameter, module
                elif parameter.ndim == 3:
                    fused.add(".".join(name.split(".")[-2:]))
        if not named:
            raise InputError(
                f"lora.target_parameters = {list(targets)!r}: no parameter of this model is called "
                f"{target!r}; of experts there are {' '.join(sorted(fused)) or 'none'}"
            )
        if linear := [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)]:
            raise InputError(
                f"lora.target_parameters: {linear[0]} belongs to a linear layer; name that in "
                "lora.targets"
            )
        found |= named
    return list(found.values())
