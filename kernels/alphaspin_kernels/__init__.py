"""Fused log-prob operators for language models: usable without the alphaspin trainer.

Every operator is registered with ``torch.library`` in the namespace ``alphaspin``, is dispatched
by device, and has a plain PyTorch definition of the same name in ``alphaspin_kernels.reference``.
:func:`patch_trl` and :func:`patch_model` put them into TRL's trainers and transformers' models;
those libraries are imported when the two are called, and not before.
"""

from alphaspin_kernels._dispatch import OPERATORS, kernel_status
from alphaspin_kernels.linear_logprob import linear_logprob
from alphaspin_kernels.linear_logprob.models import patch_model
from alphaspin_kernels.linear_logprob.trl import patch_trl
from alphaspin_kernels.logits_logprob import logits_logprob
from alphaspin_kernels.mixture_logprob import mixture_logprob
from alphaspin_kernels.segmented_lora import segmented_lora
from alphaspin_kernels.sequence_logprob import sequence_logprob
from alphaspin_kernels.subtb_loss import subtb_loss

__all__ = [
    "OPERATORS",
    "kernel_status",
    "linear_logprob",
    "logits_logprob",
    "mixture_logprob",
    "patch_model",
    "patch_trl",
    "segmented_lora",
    "sequence_logprob",
    "subtb_loss",
]
