"""Self-play preference optimisation: the squared distance of a response's gain from its target."""

from torch import Tensor


def sppo(policy: Tensor, ref: Tensor, win_prob: Tensor, *, eta: float) -> Tensor:
    """(lp_θ - lp_ref - η(P̂ - ½))²  (SPPO, Wu et al., arXiv 2405.00675, eq. 4.7), per response.

    A pair's loss is the mean of its two responses', as in the public code (`loss_type: sppo`); some
    trainers sum them. Its other variants are other win probabilities, see `judges.matrix`.

    The ½ stands for log E_ref[e^{ηP̂}]/η, the step's own log Z(x), and the loss is minimal at
    π ∝ π_ref e^{ηP̂} exactly where the two agree. An unnormalised mixture as `ref` shifts the target
    by its own log Z(x): `mixture_reference(..., log_z=...)`.

    Args:
        policy: lp_θ(y), the only argument that should carry a gradient.
        ref: lp of the previous iterate.
        win_prob: P̂(y ≻ π_t | x) in [0, 1].
        eta: η = 1/β of the public code; 1000 in the paper.
    """
    return (policy - ref - eta * (win_prob - 0.5)) ** 2
