"""T-SPIN: a demonstration over an answer, and that over the base's, without a reference."""

import torch.nn.functional as F
from torch import Tensor


def t_spin(
    chosen: Tensor, rejected: Tensor, proto: Tensor, *, alpha: float = 1.0, beta: float = 0.1
) -> Tensor:
    """-log σ(α(lp_θ(y_w) - lp_θ(y_l))) - β log σ(α(lp_θ(y_l) - lp_θ(y_0))).

    T-SPIN (Wang et al., arXiv 2601.08198, eq. 7 with the logistic ℓ, and appendix D): y_l is the
    previous iterate's answer and y_0 the base's own. Where y_l has come near y_w the second term
    still pulls, away from the base.

    Without a reference the data is no fixed point. At β = 0 the optimum of an iteration is
    π ∝ (p/π_prev)^{1/α}, whose fixed point p^{1/(1+α)} is flatter than p, with the factor -1/α: at
    α = 1 the optima alternate (`docs/theory.md`, section 1).

    Args:
        chosen: lp_θ(y_w).
        rejected: lp_θ(y_l).
        proto: lp_θ(y_0).
        alpha: α.
        beta: β, weight of the historical advantage.
    """
    current = F.logsigmoid(alpha * (chosen - rejected))
    return -current - beta * F.logsigmoid(alpha * (rejected - proto))
