"""Exact answers from the geometric mixture π(y) ∝ R(y) = Π_i π_i(y)^{w_i}, by weighting draws.

No product of per-token distributions equals π (`docs/theory.md`, section 4): answers are drawn from
a proposal q that is easy to sample, and corrected by

    log w(y) = log R(y) - log q(y),    log Ẑ(x) = log mean_n w(y_n),    E[Ẑ] = Σ_y R(y) = Z(x).

For token-level decoding log w is the sum of the log-normalisers of its steps, log Z_s <= 0.

Independent draws with these weights serve estimates, resampling and Metropolis-Hastings; sequential
Monte Carlo (`smc`) spends the same number of draws better where answers are long, because it drops
unlikely beginnings early. A correction trained for the proposal (`gflownet`) makes weights even.

Shape suffixes: B prompts, N draws (particles) per prompt, F = B·N, R draws not finished yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphaspin.foundation import rng
from alphaspin.foundation.batched import batched
from alphaspin.model.backbone import Backbone
from alphaspin.model.scoring import logps
from alphaspin.model.stepper import Ahead, Policy, Stepper
from alphaspin.model.tree import Tokens, Tree
from alphaspin.sampling.answer import Answer, Draw
from alphaspin.sampling.decode import Request, decode, invert
from alphaspin.sampling.settings import SamplingConfig
from alphaspin.sampling.weights import (
    Diagnosis,
    choose,
    diagnose,
    effective_size,
    log_mean,
    metropolis,
    resample,
)


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
    proposal: Policy | None = None,
    size: int = 64,
) -> Draws:
    """Independent draws from token-level decoding of the mixture, or of another, weighted.

    Args:
        backbone: holds the adapters.
        setting: what to draw.
        prompts: token ids [P] of B prompts.
        draws: what each prompt's random numbers are a function of.
        proposal: what to draw from, token by token, in the place of the target.
        size: trees per scoring pass, for `proposal`.
    """
    policy = setting.target if proposal is None else proposal
    requests = [
        Request(prompt, policy, setting.max_tokens, draw._replace(purpose=f"{draw.purpose}/{n}"))
        for prompt, draw in zip(prompts, draws, strict=True)
        for n in range(setting.particles)
    ]
    sampling = SamplingConfig(batch_size=setting.batch_size)
    flat = decode(backbone, requests, stop_ids=setting.stop_ids, config=sampling, record=True)
    # log q is Σ w_i log π_i of its own weights less its log-normalisers: their gap to R's remains.
    log_w = np.array([_total(answer.log_normalisers) for answer in flat])
    trees = [Tree(r.prompt, (a.tokens,)) for r, a in zip(requests, flat, strict=True)]
    for name in dict.fromkeys([*setting.target, *policy]):
        if gap := setting.target.get(name, 0.0) - policy.get(name, 0.0):
            log_w += gap * np.array(logps(backbone, name, trees, size))[:, 0]
    answers = [list(group) for group in batched(flat, setting.particles)]
    log_w_BN = torch.from_numpy(log_w).view(-1, setting.particles)
    return Draws(answers, log_w_BN, torch.arange(setting.particles).expand(log_w_BN.shape))


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
    proposal: Policy | None = None,
    size: int = 64,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
) -> tuple[list[Answer], Diagnosis]:
    """One answer per prompt from the exact mixture, up to O(1/N), and what the weights are worth.

    Args:
        backbone: holds the adapters.
        setting: what to draw; whole prompts are in progress together.
        prompts: token ids.
        draws: what each prompt's random numbers are a function of, and nothing else.
        method: sequential Monte Carlo, or independent Metropolis-Hastings.
        proposal: for `imh`, what to draw from in the place of the target.
        size: trees per scoring pass, for `proposal`.
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
                independent(backbone, setting, chosen, noise, proposal=proposal, size=size)
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
