"""Advantages of SEED-GRPO (arXiv 2505.12346): a group whose answers disagree moves the policy less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..checks import check_choice
from ..rewards.correctness import extract_answers
from ..rewards.groups import whole_groups


Estimator = Literal["count", "likelihood"]
Entropy = Literal["eq5", "shannon"]
Form = Literal["linear", "exponential", "focal", "inverse"]


def cluster_answers(answers: Sequence[str | None], num_generations: int) -> torch.Tensor:
    """
    Assign each completion to a cluster: completions of a group with the same answer share a cluster.

    Each missing answer is its own cluster. The paper does not say what happens to them: this is our choice, and that
    of a port of its code.

    Args:
        answers (`Sequence[str | None]` of length B):
            The final answer of each completion, as from [`~step_trl.rewards.extract_answers`], or `None` if it is
            missing. Groups of `num_generations` are consecutive.
        num_generations (`int`):
            The number of completions per group.

    Returns:
        `torch.LongTensor` of shape `(B,)`: The clusters 0, 1, 2, ... of each group, in the order of their first
        answers.

    Example:
    ```python
    >>> cluster_answers(["4", None, "4", None], num_generations=4).tolist()
    [0, 1, 0, 2]
    ```
    """
    clusters: list[int] = []
    numbers: dict[str | int, int] = {}  # of the group; the key of a missing answer is the completion's index
    for index, answer in enumerate(answers):
        if index % num_generations == 0:
            numbers = {}
        clusters.append(numbers.setdefault(index if answer is None else answer, len(numbers)))
    return whole_groups("answers", torch.tensor(clusters, dtype=torch.long), num_generations).reshape(-1)


def answer_clusters(
    completions: Sequence[str] | Sequence[list[dict]], num_generations: int, **options: Any
) -> torch.Tensor:
    """
    Apply [`cluster_answers`] to what [`~step_trl.rewards.extract_answers`] reads in the completions, with its options.

    To extract answers in each process and gather them, call the two functions one after the other.
    """
    return cluster_answers(extract_answers(completions, **options), num_generations)


@torch.no_grad()
def semantic_entropy(
    clusters: torch.Tensor,
    num_generations: int,
    logps: torch.Tensor | None = None,
    estimator: Estimator = "count",
    entropy: Entropy = "eq5",
) -> torch.Tensor:
    """
    Compute the entropy of the answers in each completion's group, which is 0 where all answers agree.

    The group's K clusters have masses `p_1, ..., p_K`, which sum to 1. `"eq5"`, which the paper computes, is their
    mean surprise `-(1 / K) * sum(log(p_k))`. `"shannon"`, which it defines, is `-sum(p_k * log(p_k))`.

    The masses are our choice: the paper does not say how it normalises `pi_old(o|q)`, and with the raw probabilities
    of long completions, one completion has all the mass. With `"count"`, they are shares of the completions, which
    needs no log-probabilities, and both entropies are at most `log(num_generations)`. With `"likelihood"`, each
    completion is weighted by its length-normalised probability, and `"eq5"` has no bound.

    Args:
        clusters (`torch.LongTensor` of shape `(B,)`), num_generations (`int`):
            The cluster of each completion, see [`cluster_answers`], compared only within its group.
        logps (`torch.Tensor` of shape `(B,)`, *optional*):
            The mean log-probability of the tokens of each completion under the policy that sampled it, for
            `estimator="likelihood"`.
        estimator (`"count"` or `"likelihood"`, *optional*, defaults to `"count"`):
            How the masses are estimated.
        entropy (`"eq5"` or `"shannon"`, *optional*, defaults to `"eq5"`):
            The entropy that is computed from the masses.

    Returns:
        `torch.Tensor` of shape `(B,)`: The entropies in nats, in the dtype of `logps` if given, and at least float32.
    """
    check_choice("estimator", estimator, Estimator)
    check_choice("entropy", entropy, Entropy)
    groups = whole_groups("clusters", clusters, num_generations)  # (B/G, G)
    if estimator == "count":
        weights = torch.zeros_like(groups, dtype=torch.float32)
    elif logps is None:
        raise ValueError("logps: estimator='likelihood' needs them. Give them, or set estimator='count'.")
    else:
        weights = whole_groups("logps", logps, num_generations)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))

    same = groups[:, :, None] == groups[:, None, :]  # (B/G, G, G)
    masses = torch.where(same, weights[:, None, :], -torch.inf).logsumexp(2)  # (B/G, G), of each one's cluster
    masses = masses - weights.logsumexp(1, keepdim=True)
    first = ~same.tril(-1).any(2)  # (B/G, G), one completion of each cluster
    if entropy == "eq5":
        entropies = torch.where(first, -masses, 0).sum(1) / first.sum(1)
    else:
        entropies = torch.where(first, torch.special.entr(masses.exp()), 0).sum(1)
    return entropies.repeat_interleave(num_generations)


def seed_scale(
    entropy: torch.Tensor,
    num_generations: int,
    alpha: float = 0.02,
    f: Form = "linear",
    gamma: float = 2.0,
) -> torch.Tensor:
    """
    Compute the factor `f(alpha * SE / log(G))` for each completion's advantage, 1 where its group agrees, else less.

    `SE / log(G)` is the paper's. Limiting it to 1 is our choice, since the entropy of likelihoods can exceed `log(G)`.
    The paper names the first three forms of f but does not print them. With f(0) = 1 and f decreasing, they are:

    | `f` | factor at x | source |
    |---|---|---|
    | `"linear"` | 1 - x | our choice for the paper's default |
    | `"exponential"` | exp(-x) | our choice |
    | `"focal"` | (1 - x)^gamma | our choice |
    | `"inverse"` | 1 / (1 + x) | a port of the paper's later code |

    With the paper's alpha of 0.02, the linear factor is between 0.98 and 1. With 1, a group at full entropy is not
    trained on. Above 1, the linear and the focal factor would become negative and reward failures, so they stop at 0.

    Args:
        entropy (`torch.Tensor` of shape `(B,)`):
            SE, the entropy of each completion's group, see [`semantic_entropy`].
        num_generations (`int`):
            G, the number of completions per group, at least 2.
        alpha (`float`, *optional*, defaults to `0.02`):
            The strength of the scaling, at least 0.
        f (`str`, *optional*, defaults to `"linear"`), gamma (`float`, *optional*, defaults to `2.0`):
            The form of the factor, and the exponent of the focal form.

    Returns:
        `torch.Tensor` of shape `(B,)`: The factors, between 0 and 1, in the dtype of `entropy`.
    """
    check_choice("f", f, Form)
    if num_generations < 2:
        raise ValueError(
            f"num_generations: {num_generations} leaves no entropy to scale with. Set at least 2, for groups that can "
            "disagree."
        )
    if not alpha >= 0:
        raise ValueError(f"alpha: {alpha} is negative. Set 0 for unchanged advantages, or the paper's 0.02.")
    x = alpha * (entropy / math.log(num_generations)).clamp(0, 1)
    if f == "exponential":
        return torch.exp(-x)
    if f == "inverse":
        return 1 / (1 + x)
    rest = (1 - x).clamp(min=0)
    return rest if f == "linear" else rest**gamma


def seed_advantages(
    advantages: torch.Tensor,
    entropy: torch.Tensor,
    num_generations: int,
    alpha: float = 0.02,
    f: Form = "linear",
    gamma: float = 2.0,
) -> torch.Tensor:
    """
    Multiply advantages by the [`seed_scale`] of their group.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            The advantage of each completion. In the paper, it is not divided by the standard deviation.
        entropy, num_generations, alpha, f, gamma:
            As in [`seed_scale`].

    Returns:
        `torch.Tensor` of shape `(B,)`: The scaled advantages, in the dtype of `advantages`.
    """
    return advantages * seed_scale(entropy, num_generations, alpha, f, gamma).to(advantages.dtype)
