"""What a loss of pairs is; one file each beside this one.

Every log-prob is `lp(y) = Σ_k log π(y_k | x, y_<k)` in nats, summed over the response including its
end token, a tensor [B]; every loss is [B], before any mean. `chosen` is the demonstration,
`rejected` what an earlier iterate answered. Gradients flow wherever the arguments carry them.

Pairwise losses take a difference of two responses; `Absolute` ones (`space`, `chi2`, `renyi`) the
gain of each over the reference. Pointwise ones (`sppo`, `rspo`, `nash_md`) take one response and
its win probability, of any shape: pass [B, 2] for a pair and average. The normaliser log Z(x) of a
reference cancels in the first only: the last want `mixture_reference(..., log_z=...)`.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import create_model
from torch import Tensor

from alphaspin.foundation.kinds import Kind, Need, settings_of
from alphaspin.foundation.section import NonNegativeFloat


class Pairs(NamedTuple):
    """Summed log-probs [B] of both responses, under the policy and under the reference."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


class Loss(Kind):
    """The pairwise loss on (chosen, rejected)."""

    kind: str
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen response's negative log-likelihood per token, added to any loss (as in
    Pang et al., arXiv 2404.19733, eq. 1)."""

    remedy: ClassVar[str | None] = None
    """The setting that helps when the log-probs of chosen and rejected fall together."""
    has_reference: ClassVar[bool] = True

    @abstractmethod
    def loss(self, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
        """The loss [B] of each pair at iteration t.

        Args:
            pairs: log-probs.
            lengths_B2: tokens of (chosen, rejected).
            iteration: t, which selects β.
        """

    def __call__(
        self, policy_B2: Tensor, reference_B2: Tensor, lengths_B2: Tensor, iteration: int
    ) -> Tensor:
        """The loss [B] of each pair at iteration t, with `nll_weight`.

        Args:
            policy_B2: lp_θ of (chosen, rejected), fp32.
            reference_B2: lp_ref of the same.
            lengths_B2: tokens of the same.
            iteration: t.
        """
        pairs = Pairs(*policy_B2.unbind(1), *reference_B2.unbind(1))
        loss = self.loss(pairs, lengths_B2, iteration)
        if self.nll_weight:
            loss = loss - self.nll_weight * policy_B2[:, 0] / lengths_B2[:, 0]
        return loss

    def reward_scale(self, iteration: int) -> float:
        """Factor of lp_θ - lp_ref in the rewards that are logged, β in most losses, as in TRL."""
        return 1.0

    def ignores_equal_pairs(self) -> bool:
        """Whether a pair with rejected = chosen has exactly zero gradient."""
        return self.nll_weight == 0

    def title(self) -> str:
        """What it is, for the report."""
        return f"the loss {self.kind}"

    @classmethod
    def of_function(cls, function: Callable[..., Any], name: str) -> type[Self]:
        """The loss that `function(chosen, rejected, ref_chosen, ref_rejected, *, …)` computes."""

        def loss(self: Loss, pairs: Pairs, lengths_B2: Tensor, iteration: int) -> Tensor:
            del lengths_B2, iteration
            return function(*pairs, **{key: getattr(self, key) for key in settings})

        settings = settings_of(function)
        kind = create_model(function.__name__, __base__=cls, **settings)
        kind.loss = loss
        # Nothing tells whether its gradient vanishes where the two responses are one.
        kind.ignores_equal_pairs = lambda self: False
        return kind


class Absolute(Loss):
    """A loss of each response's own gain r = lp_θ - lp_ref, and so of no difference of two.

    The optimum is the data's distribution p where p = π_ref e^r can be read off the pairs, which
    takes losers of the reference itself. A pair with rejected = chosen still has a gradient.
    """

    def needs(self, config: Any) -> tuple[Need, ...]:
        """A normalised reference."""
        reference = config.reference
        mixed = reference.kind != "arithmetic" and 0 < reference.alpha < 1
        why = "log Z(x) of a geometric mixture cancels only in a difference of two responses"
        return (Need("reference.kind", ("arithmetic",), why),) if mixed else ()

    def ignores_equal_pairs(self) -> bool:
        """Never."""
        return False


def margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Δ = (lp_θ(y_w) - lp_ref(y_w)) - (lp_θ(y_l) - lp_ref(y_l)).

    The normaliser of an unnormalised reference, such as log Z(x) of the geometric mixture, cancels.
    """
    return (chosen - ref_chosen) - (rejected - ref_rejected)
