"""Settings of optimisation."""

from typing import Annotated, Literal

from pydantic import Field

from alphaspin.foundation.section import (
    Fraction,
    NonNegativeFloat,
    PerIterationFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)


class TrainConfig(Section):
    """Optimisation within one iteration."""

    batch_size: PositiveInt = 32
    """Pairs per optimiser step."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimiser step; `batch_size` is split over them. Several processes share
    them, their number rounded up to a multiple of the processes'."""
    epochs: PositiveInt = 1
    """Passes over the pairs of an iteration."""
    max_steps: PositiveInt | None = None
    """Upper limit of optimiser steps per iteration."""
    lr: PerIterationFloat = (5e-5,)
    """Peak learning rate, per iteration."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: Fraction = 0.1
    """Share of an iteration's steps in which the rate rises from 0."""
    optimizer: Literal["adamw", "adamw_8bit", "rmsprop"] = "adamw"
    """Optimiser, as in torch.optim; `adamw_8bit` is bitsandbytes' AdamW, whose moments take 8 bits
    instead of 32 in matrices of 4,096 numbers and more."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW (L2 for RMSProp)."""
    clip: PositiveFloat | None = 1.0
    """Largest gradient norm; `None` for no clipping."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the frozen base and the activations: `auto` is bf16 on a GPU that has it, else fp32.
    Adapters and optimiser are always fp32."""
    quantization: Literal["none", "nf4"] = "none"
    """Weights of the frozen base, all but embeddings and head: in `dtype`, or in 4 bits (`nf4`,
    QLoRA's, by bitsandbytes), about a quarter of the memory of bf16. A layer is dequantised once
    for all policies of a pass, and again in the backward pass; in sampling, for each token. A
    server that samples has a base of its own."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """`packed`: all trees (a prompt and its answers) of a micro-batch in one row, no padding.
    `padded`: one prompt and one answer per row, by the family's own code, which any family has.
    `auto`: packed where the model's family can be."""
    liger: Literal["auto", "off"] = "auto"
    """`auto`: Liger's kernels compute norms, rotary positions and MLPs of a base on a GPU, if they
    are installed and know its family and it is not sharded."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    skip_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """ε: tokens whose probabilities do not reach it, in any of some hundred neighbouring
    predictions, are left out of the gradient's second product with the head. Losses stay exact; the
    metric `skipped_mass`, the probability left out of a predicted token, bounds the error: of a
    gradient with respect to a hidden state by that times the largest weight of the head."""
    sharding: Literal["none", "fsdp"] = "none"
    """What each of several processes holds of the frozen base: all of it, or with `fsdp` a share of
    every layer, gathered when a pass reaches it. Adapters and the head are whole in each."""
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between two durable checkpoints."""

    @property
    def scored_together(self) -> int:
        """Pairs per pass without a gradient: two micro-batches' worth."""
        return 2 * max(1, self.batch_size // self.accumulation)
