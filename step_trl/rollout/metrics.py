"""Metrics of truncated rollouts, per completion or per probe. Trainers log their means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from . import Rollout


# Edges of the confidence histogram. The last bin starts at the threshold.
CONFIDENCE_BINS = (0.0, 0.25, 0.5, 0.75, 0.9)


def rollout_metrics(rollouts: Sequence[Rollout], threshold: float) -> dict[str, list[float]]:
    """
    Compute the metrics of a batch of rollouts that exit above the confidence `threshold`.

    Returns:
        `dict[str, list[float]]`: name to values, whose mean over all processes is the metric:
        - `exit_rate`: share of completions whose thought was truncated.
        - `probes_per_completion`, `probe_tokens`: number of probes and of their answer tokens per completion.
        - `probes/early_rejected`: share of abandoned probes.
        - `confidence/mean`, `confidence/A-B`: mean confidence of the completed probes, and share in each bin.
    """
    probes = [probe for rollout in rollouts for probe in rollout.probes]
    confidences = [probe.confidence for probe in probes if probe.confidence is not None]
    metrics = {
        "exit_rate": [float(rollout.truncated) for rollout in rollouts],
        "probes_per_completion": [float(len(rollout.probes)) for rollout in rollouts],
        "probe_tokens": [float(sum(len(probe.token_ids) for probe in rollout.probes)) for rollout in rollouts],
        "probes/early_rejected": [float(probe.outcome == "abandoned") for probe in probes],
        "confidence/mean": confidences,
    }
    edges = sorted({*(edge for edge in CONFIDENCE_BINS if edge < threshold), threshold, 1.0})
    for low, high in pairwise(edges):
        name = f"confidence/{low:.2f}-{high:.2f}"
        # A confidence equal to the threshold does not exit: bins are open below and closed above.
        metrics[name] = [float(low < confidence <= high or confidence == low == 0.0) for confidence in confidences]
    return metrics
