"""TRL's CPO and SimPO without logits: see `trl`.

Shape suffixes: B rows, the chosen ones first, C rows of one side, S tokens of a row.
"""

import functools
import warnings
from typing import Any

import torch


def with_fused_head(init: Any, utils: Any) -> Any:
    """``CPOTrainer.__init__`` that gives the model TRL's fused head, where that serves it."""

    @functools.wraps(init)
    def with_head(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        # Liger, asked for here, takes the model's forward when training starts.
        others = self.is_encoder_decoder or self.aux_loss_enabled or self.args.use_liger_kernel
        self._alphaspin = not others
        if others:
            return
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        forward = model.__dict__.get("forward")
        try:
            utils.add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))
        except ValueError as problem:  # CPO's own logits are right whatever the head is
            self._alphaspin = False
            del model.forward
            if forward is not None:
                model.forward = forward
            warnings.warn(
                f"CPOTrainer builds logits, as without patch_trl: {problem}", stacklevel=2
            )

    return with_head


def without_logits(forward: Any) -> Any:
    """``CPOTrainer.concatenated_forward`` by the fused head; TRL's for trainers that have none."""

    @functools.wraps(forward)
    def concatenated_forward(self: Any, model: Any, batch: Any) -> Any:
        if not getattr(self, "_alphaspin", False):
            return forward(self, model, batch)
        inputs = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.pad_token_id,
            device=self.accelerator.device,
        )
        labels_BS, chosen = inputs["concatenated_labels"], len(batch["chosen_labels"])
        outputs = model(
            inputs["concatenated_input_ids"],
            attention_mask=inputs["concatenated_attention_mask"],
            labels=labels_BS,
            fused_lm_head=True,
        )
        logps_B = outputs.log_probs.sum(1)
        # The mean of the chosen answers' tokens, as cross-entropy with -100 takes it.
        mask_BS = outputs.label_mask
        nll = -logps_B[:chosen].sum() / mask_BS[:chosen].sum()
        if self.loss_type in ("ipo", "simpo"):
            logps_B = logps_B / mask_BS.sum(1)
        # Of the logits TRL takes the mean alone.
        sides = [chosen, len(logps_B) - chosen]
        means = zip(outputs.mean_logits.split(sides), mask_BS.split(sides), strict=True)
        logits = [mean_CS[mask_CS] for mean_CS, mask_CS in means]
        return (
            logps_B[:chosen],
            logps_B[chosen:],
            *logits,
            nll if self.cpo_alpha else torch.zeros_like(nll),
        )

    return concatenated_forward
