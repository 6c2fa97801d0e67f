"""Vectorised sampling. Each row of a batch has its own options and random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """
    Return a number in [0, 1) for each pair of seed and counter, independent of the rest of the batch.

    A number has 52 bits, so that `number * total` stays below `total` after rounding.
    """
    bits = _mix(_mix(seeds.astype(np.uint64)) + _GOLDEN * (counters.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(12)) * 2.0**-52


@dataclass(frozen=True)
class SamplingOptions:
    """
    Options of the N rows of a batch, (N, 1) each, or `None` for an option that no row uses.

    The other options of greedy rows are off.
    """

    greedy: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None

    @classmethod
    def from_rows(cls, rows: np.ndarray, device: torch.device | str = "cpu") -> SamplingOptions:
        """Read a structured array with the fields `temperature`, `top_k`, `top_p` and `min_p`."""
        greedy = rows["temperature"] == 0

        def column(values: np.ndarray, off: float, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
            values = np.where(greedy, off, values)
            return torch.tensor(values, dtype=dtype, device=device)[:, None] if (values != off).any() else None

        return cls(
            greedy=torch.tensor(greedy, device=device)[:, None] if greedy.any() else None,
            temperature=column(rows["temperature"], 1.0),
            top_k=column(rows["top_k"], 0, torch.int64),
            top_p=column(rows["top_p"], 1.0),
            min_p=column(rows["min_p"], 0.0),
        )


def process_logits(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Apply the warpers of transformers in their order (temperature, top-k, top-p, min-p) to each row, (N, V)."""
    if options.temperature is not None:
        logits = logits / options.temperature
    if options.top_k is not None or options.top_p is not None:
        logits = _filter_sorted(logits, options.top_k, options.top_p)
    if options.min_p is not None:
        probs = logits.softmax(dim=-1)
        unlikely = probs < options.min_p * probs.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(unlikely, -torch.inf)
    return logits


def _filter_sorted(logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    ranked, order = logits.sort(dim=-1)  # ascending
    if top_k is not None:
        vocab_size = logits.size(-1)
        kept = top_k.masked_fill(top_k == 0, vocab_size).clamp(max=vocab_size)
        ranked = ranked.masked_fill(ranked < ranked.gather(-1, vocab_size - kept), -torch.inf)
    if top_p is not None:
        beyond = ranked.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        beyond &= top_p < 1  # rows without the option keep probabilities that underflow to 0
        beyond[:, -1] = False
        ranked = ranked.masked_fill(beyond, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ranked)


def sample(
    logits: torch.Tensor,
    options: SamplingOptions,
    random_numbers: torch.Tensor,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sample one token per row of logits (N, V) by inverting its cumulative distribution at `random_numbers` (N,),
    float64. Rows with an id of at least 0 in `forced` (N,) take that token instead.

    Returns token ids (N,) and their log-probabilities (N,) under the processed distribution, or for greedy rows under
    that of the model.
    """
    logits = process_logits(logits.float(), options)
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    if options.greedy is not None and bool(options.greedy.all()):
        ids = logits.argmax(dim=-1, keepdim=True)
    else:
        # right=True skips tokens of probability 0: their cumulative value equals that of the token before.
        cumulative = (logits - normalizer).exp().cumsum(dim=-1, dtype=torch.float64)
        ids = torch.searchsorted(cumulative, random_numbers[:, None] * cumulative[:, -1:], right=True)
        ids = ids.clamp(max=logits.size(-1) - 1)  # only for NaN, which the log-probability reveals
        if options.greedy is not None:
            ids = torch.where(options.greedy, logits.argmax(dim=-1, keepdim=True), ids)
    if forced is not None:
        ids = torch.where(forced[:, None] >= 0, forced[:, None], ids)
    logprobs = logits.gather(-1, ids) - normalizer
    return ids[:, 0], logprobs[:, 0]
