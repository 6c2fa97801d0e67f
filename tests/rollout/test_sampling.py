"""Vectorised sampling against the definitions and the warpers of transformers."""

from __future__ import annotations

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from step_trl.rollout.engines.sampling import SamplingOptions, process_logits, sample, uniforms


def test_uniforms_are_uniform_and_independent():
    seeds, counters = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300), indexing="ij")
    numbers = uniforms(seeds, counters)
    assert 0 <= numbers.min() and numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 150  # chi-square, 99 degrees of freedom: 0.999 quantile
    for neighbour in (numbers[1:], numbers[:, 1:]):
        here = numbers[: neighbour.shape[0], : neighbour.shape[1]]
        assert abs(np.corrcoef(here.ravel(), neighbour.ravel())[0, 1]) < 0.012


def test_tokens_are_drawn_from_the_softmax():
    count, vocab = 50_000, 12
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 3] = -torch.inf
    numbers = torch.from_numpy(uniforms(np.full(count, 11), np.arange(count)))
    ids, logprobs = sample(logits.expand(count, -1), SamplingOptions(), numbers)
    expected = logits.softmax(-1)[0].double() * count
    observed = torch.bincount(ids, minlength=vocab)
    assert observed[3] == 0
    kept = expected > 0
    assert ((observed - expected) ** 2 / expected)[kept].sum() < 29.6  # chi-square, 10 degrees of freedom: 0.999
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[ids])


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    ids, _ = sample(logits, SamplingOptions(), torch.tensor([0.0, 0.5, 1 - 2**-52], dtype=torch.float64))
    assert ids.tolist() == [1, 3, 3]


def test_filters_equal_those_of_transformers():
    cases = [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1),
             (0.7, 20, 0.8, 0.05), (1.5, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (2.0, 1000, 0.99, 0.01)]  # fmt: skip
    logits = (torch.randn(len(cases), 50, generator=torch.Generator().manual_seed(1)) * 3).round(decimals=1)  # ties
    fields = ("temperature", "top_k", "top_p", "min_p")
    options = np.array(cases, dtype=[(name, np.float64) for name in fields])
    processed = process_logits(logits, SamplingOptions.from_rows(options))
    for row, (temperature, top_k, top_p, min_p) in enumerate(cases):
        expected = TemperatureLogitsWarper(temperature)(None, logits[row : row + 1])
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        expected = MinPLogitsWarper(min_p)(None, expected) if min_p else expected
        assert torch.equal(processed[row], expected[0]), cases[row]
