"""Settings of judged self-play."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from alphaspin.foundation.section import (
    RECORDED,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    refuse_unused,
)


class PreferenceConfig(Section):
    """SPPO, RSPO and Nash-MD: a judge compares responses of the current iterate."""

    responses: Annotated[int, Field(ge=2)] = 5
    """Responses K per prompt; the best and the worst of them are trained on."""
    labels: Literal["soft", "single", "hard", "bradley_terry"] = "soft"
    """Win probability each is trained on: P̂ against all K (`soft`, the paper), against the other
    one (`single`), 1 and 0 (`hard`), or P̂ of the Bradley-Terry fit (`bradley_terry`)."""
    eta: PositiveFloat = 1000.0
    """η = 1/β: a response with win probability P̂ should gain η(P̂ - ½) nats."""
    regulariser: Literal["reverse_kl", "forward_kl", "forward_reverse", "chi2", "entropy"] = (
        "reverse_kl"
    )
    """R of `rspo`, towards the base."""
    lam: NonNegativeFloat = 0.5
    """λ of `rspo`; published: 0.5 for `reverse_kl`, 0.1 for `forward_kl` and `forward_reverse`."""
    clamp: PositiveFloat | None = None
    """Largest exponent of the importance ratios of `rspo`, in nats; `None` is the published one (7
    for `forward_kl`, 10 for `forward_reverse` and `chi2`)."""
    reverse_weight: NonNegativeFloat = 5.0
    """Weight of the reverse KL in `forward_reverse`."""
    tau: PositiveFloat = 0.1
    """τ of `nash_md`: weight of the KL to the base, against win probabilities."""
    mixture: Fraction = 0.25
    """m of `nash_md`: share of the base's logits in the opponent's."""

    @model_validator(mode="after")
    def _used(self, info: ValidationInfo) -> "PreferenceConfig":
        users = {
            "clamp": ("forward_kl", "forward_reverse", "chi2"),
            "reverse_weight": ("forward_reverse",),
        }
        if info.context is not RECORDED:
            chosen = self.regulariser
            refuse_unused(self, "preference.regulariser", chosen, users, "preference.")
        return self
