"""Exact answers from the geometric mixture π(y) ∝ R(y) = Π_i π_i(y)^{w_i}, by weighting draws.

No product of per-token distributions equals π (`docs/theory.md`, section 4): answers are drawn from
a proposal q that is easy to sample, and corrected by

    log w(y) = log R(y) - log q(y),    log Ẑ(x) = log mean_n w(y_n),    E[Ẑ] = Σ_y R(y) = Z(x).

For token-level decoding log w is the sum of the log-normalisers of its steps, log Z_s <= 0.

Independent draws with these weights serve estimates, resampling and Metropolis-Hastings; sequential
Monte Carlo (`smc`) spends the same number of draws better where answers are long, because it drops
unlikely beginnings early. An adapter trained as proposal (`gflownet`) makes the weights even.

Shape suffixes: B prompts, N draws (particles) per prompt, F = B·N, R draws not finished yet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphaspin.foundation import rng
from alphaspin.model.backbone import Backbone
from alphaspin.model.batching import Tokens, Tree
from alphaspin.model.scoring import batched, logps
from alphaspin.model.stepper import Ahead, Policy, Stepper
from alphaspin.sampling.decode import Answer, Draw, Request, decode, invert
from alphaspin.sampling.settings import SamplingConfig
from alphaspin.training.settings import TrainConfig

LOW_SIZE, LARGE_SHARE = 0.1, 0.5
"""Weights are not to be trusted where the effective sample size is below this share of N, or the
largest weight above this share of the sum."""


def log_mean(log_w_BN: Tensor) -> Tensor:
    """log Ẑ(x) = log((1/N) Σ_n w_n) per prompt, [B]; Ẑ is unbiased, log Ẑ low by Var(w/Z)/2N."""
    return log_w_BN.double().logsumexp(1) - math.log(log_w_BN.shape[1])


def effective_size(log_w_BN: Tensor) -> Tensor:
    """Effective sample size (Σ w)² / Σ w² per prompt, [B], from 1 to N (Kong, 1992)."""
    return 1 / log_w_BN.double().softmax(1).square().sum(1)


def resample(log_w_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """Systematic resampling: N indices per prompt, n with multiplicity ⌊N W_n⌋ or ⌈N W_n⌉.

    With the normalised weights W, draw k is the n at which their running sum passes (k + u)/N.

    Args:
        log_w_BN: log-weights.
        uniform_B: one number in [0, 1) per prompt.

    Returns:
        [B, N] int64, each row in ascending order.

    Source: Kitagawa, "Monte Carlo filter and smoother" (1996).
    """
    draws = log_w_BN.shape[1]
    steps_N = torch.arange(draws, dtype=torch.float64, device=log_w_BN.device)
    return _invert(log_w_BN, (steps_N + uniform_B.double()[:, None]) / draws)


def choose(log_w_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per prompt, [B] int64, drawn in proportion to the weights."""
    return _invert(log_w_BN, uniform_B.double()[:, None])[:, 0]


def _invert(log_w_BN: Tensor, point_BK: Tensor) -> Tensor:
    """The indices at which the distribution function passes given points of [0, 1)."""
    total_BN = log_w_BN.double().softmax(1).cumsum(1)
    # The running sum ends at exactly 1, so that it passes every point, and an entry without weight
    # is never the one that does. (N-1+u)/N can round up to 1.
    point_BK = point_BK.clamp(max=math.nextafter(1, 0))
    return torch.searchsorted(total_BN / total_BN[:, -1:], point_BK, right=True)


def metropolis(log_w_BN: Tensor, uniform_BN: Tensor) -> Tensor:
    """Independent Metropolis-Hastings over the draws in their order: where each chain stands.

    The chain starts at draw 0 and moves to draw n where u_n < w_n / w_current. Its law approaches
    π at the rate (1 - Z / max w)^n (Mengersen and Tweedie, 1996, theorem 2.1).

    Args:
        log_w_BN: log-weights of independent draws.
        uniform_BN: numbers in [0, 1); column 0 is not used.

    Returns:
        [B, N] int64, the index after each step; the last column is the answer.
    """
    log_u_BN = uniform_BN.double().log()
    rows_B = torch.arange(len(log_w_BN), device=log_w_BN.device)
    at_B = torch.zeros_like(rows_B)
    path: list[Tensor] = [at_B]
    for n in range(1, log_w_BN.shape[1]):
        gain_B = (log_w_BN[:, n] - log_w_BN[rows_B, at_B]).double()
        at_B = torch.where(log_u_BN[:, n] < gain_B, n, at_B)
        path.append(at_B)
    return torch.stack(path, 1)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the weights of some prompts are worth.

    log_z: [B] log Ẑ, nats. size: [B] ESS/N. share: [B] largest w / Σ w. spread: [B] Var(log w)
    over the draws, which is 0 where the proposal is π. draws: N.
    """

    log_z: Tensor
    size: Tensor
    share: Tensor
    spread: Tensor
    draws: int

    @property
    def trusted(self) -> Tensor:
        """[B] bool: ESS/N >= 0.1 and no draw has more than half of the weight.

        A light check of what the draws show. Neither it nor any other sees mass that the proposal
        never reached: there log Ẑ is too low and the weights look even (Chatterjee and Diaconis,
        2018, on why the largest share is the better of the two).
        """
        return (self.size >= LOW_SIZE) & (self.share <= LARGE_SHARE)

    def note(self) -> str:
        """One sentence for the console and the metrics; it begins with the mean ESS/N."""
        bad = int((~self.trusted).sum())
        text = f"mean ESS {self.size.mean():.2f} of the {self.draws} draws of a prompt"
        if not bad:
            return text
        return (
            f"{text}; the weights of {bad} of {len(self.size)} prompts are NOT to be trusted (ESS "
            f"below {LOW_SIZE:g} of the draws, or one with over {LARGE_SHARE:g} of the weight): "
            "their answers repeat few draws and log Z is underestimated; draw more, or train a "
            "gflownet as the proposal"
        )


def diagnose(log_w_BN: Tensor) -> Diagnosis:
    """Judge the weights of independent draws from one proposal."""
    log_w_BN, draws = log_w_BN.double(), log_w_BN.shape[1]
    share_B = log_w_BN.softmax(1).max(1).values
    spread_B = log_w_BN.var(1, correction=0)
    return Diagnosis(log_mean(log_w_BN), effective_size(log_w_BN) / draws, share_B, spread_B, draws)


# Draws with weights


@dataclass(frozen=True, slots=True)
class Draws:
    """N answers to each of B prompts, with weights towards the exact mixture.

    log_w_BN: float64; log Ẑ is their `log_mean`. origin_BN: int64, the first of the draws that have
    a common ancestor: its own number where draws are independent.
    """

    answers: list[list[Answer]]
    log_w_BN: Tensor
    origin_BN: Tensor

    def diagnose(self) -> Diagnosis:
        """Judge the weights; draws with a common ancestor count as one.

        So the ESS of sequential Monte Carlo is that of its lineages (as in the variance estimate
        of Lee and Whiteley, 2018): its last weights alone are even by construction.
        """
        top_B1 = self.log_w_BN.max(1, keepdim=True).values
        total_BN = torch.zeros_like(self.log_w_BN).scatter_add(
            1, self.origin_BN, (self.log_w_BN - top_B1).exp()
        )
        return replace(diagnose(total_BN.log() + top_B1), spread=self.log_w_BN.var(1, correction=0))


@dataclass(frozen=True, slots=True)
class Setting:
    """What to draw: weights of the mixture by adapter (None is the base), draws N per prompt, cap
    on an answer's tokens, tokens that end it, sequences in progress at a time."""

    target: Policy
    particles: int
    max_tokens: int
    stop_ids: frozenset[int]
    batch_size: int = 256


def independent(
    backbone: Backbone,
    setting: Setting,
    prompts: Sequence[Tokens],
    draws: Sequence[Draw],
    *,
    proposal: str | None = None,
    train: TrainConfig | None = None,
) -> Draws:
    """Independent draws from token-level decoding of the mixture, or from an adapter, weighted.

    Args:
        backbone: holds the adapters.
        setting: what to draw.
        prompts: token ids [P] of B prompts.
        draws: what each prompt's random numbers are a function of.
        proposal: an adapter to draw from in the place of token-level decoding.
        train: size of the scoring passes, for `proposal`.
    """
    policy: Policy = setting.target if proposal is None else {proposal: 1.0}
    requests = [
        Request(prompt, policy, setting.max_tokens, draw._replace(purpose=f"{draw.purpose}/{n}"))
        for prompt, draw in zip(prompts, draws, strict=True)
        for n in range(setting.particles)
    ]
    sampling = SamplingConfig(batch_size=setting.batch_size)
    flat = decode(
        backbone, requests, stop_ids=setting.stop_ids, config=sampling, record=proposal is None
    )
    if proposal is None:
        log_w = [_total(answer.log_normalisers) for answer in flat]
    else:
        trees = [Tree(r.prompt, (a.tokens,)) for r, a in zip(requests, flat, strict=True)]
        log_w = log_weights(backbone, setting.target, proposal, trees, train or TrainConfig())
    answers = [list(group) for group in batched(flat, setting.particles)]
    log_w_BN = torch.tensor(log_w, dtype=torch.float64).view(-1, setting.particles)
    return Draws(answers, log_w_BN, torch.arange(setting.particles).expand(log_w_BN.shape))


def log_weights(
    backbone: Backbone, target: Policy, proposal: str, trees: Sequence[Tree], train: TrainConfig
) -> list[float]:
    """log R(y) - log q(y) of trees with one answer each, for an adapter q."""
    total = np.zeros(len(trees))
    for name, weight in [*target.items(), (proposal, -1.0)]:
        total += weight * np.array(logps(backbone, name, trees, train))[:, 0]
    return total.tolist()


def _total(values: NDArray[np.float32] | None) -> float:
    assert values is not None
    return float(values.sum(dtype=np.float64))


class Steps(Protocol):
    """Sequences in progress: `stepper.Stepper`, or a table in its place."""

    def prefill(self, prompts: Sequence[Tokens], policies: Sequence[Policy]) -> Ahead:
        """Add sequences."""
        ...

    def step(self, tokens_N: Tensor) -> Ahead:
        """Append a token to each."""
        ...

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes what sequence `indices[i]` was."""
        ...


def smc(
    steps: Steps,
    setting: Setting,
    prompts: Sequence[Tokens],
    draws: Sequence[Draw],
    *,
    threshold: float = 0.5,
) -> Draws:
    """Sequential Monte Carlo with token-level decoding as the proposal, all prompts in one batch.

    A particle's weight is multiplied by Z_s before its token at s is drawn (it does not depend on
    the token). Where the effective size of a prompt's particles falls below `threshold` of them
    they are resampled first, finished ones with the others: copies part at once. A finished
    particle keeps its weight.

    Args:
        steps: without sequences yet, with log-normalisers.
        setting: what to draw.
        prompts: token ids [P] of B prompts.
        draws: what each prompt's random numbers are a function of.
        threshold: share of N; 0 never resamples, and gives the weights of independent draws.

    Source: Del Moral, Doucet and Jasra (2006); "fully adapted" is Pitt and Shephard's (1999) form.
    """
    particles, max_tokens, target = setting.particles, setting.max_tokens, setting.target
    count = len(prompts) * particles
    numbers = np.stack(  # one for each particle and position, and one for resampling there
        [rng.generator(*draw).random((max_tokens, particles + 1)) for draw in draws]
    )
    token_u_BLN, resample_u_BL = numbers[:, :, :-1], torch.from_numpy(numbers[:, :, -1])
    tokens_FL = np.zeros((count, max_tokens), np.int32)
    length_F = np.zeros(count, np.int64)
    ended_F = np.zeros(count, np.bool_)
    origin_F = np.arange(count)
    log_w_BN = torch.zeros(len(prompts), particles, dtype=torch.float64)
    live_R = np.arange(count)
    ahead = steps.prefill([p for p in prompts for _ in range(particles)], [target] * count)
    for at in range(max_tokens):
        logits_RV, log_z_R = ahead
        assert log_z_R is not None
        log_w_BN.view(-1)[torch.from_numpy(live_R)] += log_z_R.double().cpu()
        uneven_B = effective_size(log_w_BN) < threshold * particles
        if uneven_B.any():
            parent_BN = torch.arange(count).view(-1, particles)
            drawn = resample(log_w_BN[uneven_B], resample_u_BL[uneven_B, at])
            parent_BN[uneven_B] = parent_BN[uneven_B].gather(1, drawn)
            log_w_BN[uneven_B] = log_mean(log_w_BN[uneven_B])[:, None].expand(-1, particles)
            parent_F = parent_BN.flatten().numpy()
            place_F = np.full(count, -1)  # of a live particle among the sequences
            place_F[live_R] = np.arange(len(live_R))
            source_F = place_F[parent_F]
            live_R = (source_F >= 0).nonzero()[0]
            source_R = source_F[live_R]
            steps.select(source_R.tolist())
            logits_RV = logits_RV[torch.from_numpy(source_R).to(logits_RV.device)]
            tokens_FL, length_F = tokens_FL[parent_F], length_F[parent_F]
            ended_F, origin_F = ended_F[parent_F], origin_F[parent_F]
        uniform_R = torch.from_numpy(token_u_BLN[live_R // particles, at, live_R % particles])
        token_R = invert(logits_RV.softmax(-1), uniform_R.to(logits_RV.device))
        tokens_FL[live_R, at] = token_R.cpu().numpy()
        length_F[live_R] = at + 1
        ended_F[live_R] = np.isin(tokens_FL[live_R, at], list(setting.stop_ids))
        keep = (~ended_F[live_R]).nonzero()[0]
        if not len(keep) or at + 1 == max_tokens:
            break
        if len(keep) < len(live_R):
            steps.select(keep.tolist())
            live_R, token_R = live_R[keep], token_R[torch.from_numpy(keep).to(token_R.device)]
        ahead = steps.step(token_R)
    flat = [Answer(tokens_FL[f, : length_F[f]].copy(), not bool(ended_F[f])) for f in range(count)]
    answers = [flat[i : i + particles] for i in range(0, count, particles)]
    origin_BN = torch.from_numpy(origin_F % particles).view(-1, particles)
    return Draws(answers, log_w_BN, origin_BN)


def sample(
    backbone: Backbone,
    setting: Setting,
    prompts: Sequence[Tokens],
    draws: Sequence[Draw],
    *,
    method: Literal["smc", "imh"],
    proposal: str | None = None,
    train: TrainConfig | None = None,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
) -> tuple[list[Answer], Diagnosis]:
    """One answer per prompt from the exact mixture, up to O(1/N), and what the weights are worth.

    Args:
        backbone: holds the adapters.
        setting: what to draw; whole prompts are in progress together.
        prompts: token ids.
        draws: what each prompt's random numbers are a function of, and nothing else.
        method: sequential Monte Carlo, or independent Metropolis-Hastings.
        proposal: for `imh`, an adapter to draw from in the place of token-level decoding.
        train: size of the scoring passes, for `proposal`.
        progress: called with the answers finished and the tokens decoded.
    """
    found: list[Draws] = []
    for part in batched(range(len(prompts)), max(1, setting.batch_size // setting.particles)):
        chosen, noise = [prompts[i] for i in part], [draws[i] for i in part]
        if method == "smc":
            steps = Stepper(backbone, log_normalisers=True)
            found.append(smc(steps, setting, chosen, noise))
        else:
            found.append(
                independent(backbone, setting, chosen, noise, proposal=proposal, train=train)
            )
        tokens = sum(len(answer.tokens) for group in found[-1].answers for answer in group)
        progress(len(part), tokens)
    every = Draws(
        [group for some in found for group in some.answers],
        torch.cat([some.log_w_BN for some in found]),
        torch.cat([some.origin_BN for some in found]),
    )
    last = [rng.generator(*draw._replace(purpose=f"{draw.purpose}/choose")) for draw in draws]
    uniform_BN = torch.from_numpy(np.stack([g.random(setting.particles) for g in last]))
    if method == "smc":
        index_B = choose(every.log_w_BN, uniform_BN[:, 0])
    else:
        index_B = metropolis(every.log_w_BN, uniform_BN)[:, -1]
    picked = zip(every.answers, index_B.tolist(), strict=True)
    return [group[i] for group, i in picked], every.diagnose()
