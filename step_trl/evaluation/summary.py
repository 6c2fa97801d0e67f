"""Summarize samples to the numbers of the papers' tables, with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..token_targets import TARGET_COLUMN
from .metrics import accuracy_efficiency_score


MEASURES = {"correct": "accuracy", "tokens": "tokens", "steps": "steps"}


def summarize(
    samples: pd.DataFrame,
    vanilla: pd.DataFrame | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """
    Compute accuracy, tokens, steps, compression rate and AES per benchmark and overall, with bootstrap intervals.

    Accuracy is the mean over problems of the share of correct samples, which is Pass@1 over n samples. The overall
    values are means over benchmarks, except for AES, which is computed from the overall accuracy and tokens. The
    intervals are percentiles over resamples of the problems of each benchmark (not of the samples of a problem), with
    the same problems for both models.

    Args:
        samples ([`~pandas.DataFrame`]):
            The result of [`evaluate`].
        vanilla ([`~pandas.DataFrame`], *optional*):
            The same for the vanilla model on the same problems; `cr` and `aes` are relative to it.
        confidence (`float`, *optional*, defaults to `0.95`):
            The confidence level of the intervals.
        resamples (`int`, *optional*, defaults to `2000`), seed (`int`, *optional*, defaults to `0`):
            The number of resamples, and their seed.

    Returns:
        [`~pandas.DataFrame`]: One row per benchmark, with `"overall"` last, and the columns `accuracy` (between 0 and
        1), `tokens`, `steps`, `cr` and `aes`, each followed by its `_low` and `_high`. `aes` is NaN if the vanilla
        model solves nothing, because it is relative to that. If prompts ask for a length (samples have
        `target_tokens`), there are also `deviation`, the mean absolute distance from that length relative to it, and
        `over_target`, the share of completions above it.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1. Set, for example, 0.95.")
    own = _by_problem(samples)
    base = None if vanilla is None else _by_problem(vanilla)[list(MEASURES.values())]
    if base is not None and not own.index.sort_values().equals(base.index.sort_values()):
        raise ValueError(
            f"samples, vanilla: the {len(own)} and {len(base)} problems are not the same. Evaluate both models on "
            "the same benchmarks, and on as many problems of each."
        )
    generator = np.random.default_rng(seed)
    estimates: dict[str, dict[str, np.ndarray]] = {}
    spreads: dict[str, dict[str, float]] = {}
    for name, problems in own.groupby(level="benchmark", sort=False):
        places = np.vstack(
            [np.arange(len(problems)), generator.integers(len(problems), size=(resamples, len(problems)))]
        )
        means = _means(problems.dropna(axis="columns", how="all"), places)
        if base is not None:
            means |= {f"base_{key}": value for key, value in _means(base.loc[problems.index], places).items()}
            means |= {"cr": means["tokens"] / means["base_tokens"], "aes": _scores(means)}
        estimates[str(name)] = means
    estimates["overall"] = _overall(list(estimates.values()))
    for name, columns in estimates.items():
        spreads[name] = {}
        for key, values in columns.items():
            if not key.startswith("base_"):
                defined = values[~np.isnan(values)]
                levels = [(1 - confidence) / 2, (1 + confidence) / 2]
                low, high = np.quantile(defined, levels) if len(defined) else (np.nan, np.nan)
                spreads[name] |= {key: values[0], f"{key}_low": low, f"{key}_high": high}
    return pd.DataFrame.from_dict(spreads, orient="index").rename_axis("benchmark")


def _by_problem(samples: pd.DataFrame) -> pd.DataFrame:
    measures = samples[["benchmark", "problem"]].assign(
        **{name: samples[column].astype(float) for column, name in MEASURES.items()}
    )
    if TARGET_COLUMN in samples:
        target = samples[TARGET_COLUMN]
        measures["deviation"] = (samples["tokens"] - target).abs() / target
        measures["over_target"] = (samples["tokens"] > target).astype(float).where(target.notna())
    return measures.groupby(["benchmark", "problem"], sort=False).mean()


def _means(problems: pd.DataFrame, places: np.ndarray) -> dict[str, np.ndarray]:
    """Return the means over the problems at `places` `(R, P)`: over all problems first, then over the resamples."""
    return {str(column): problems[column].to_numpy()[places].mean(axis=1) for column in problems}


def _overall(benchmarks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    keys = dict.fromkeys(key for benchmark in benchmarks for key in benchmark)
    # Average only over benchmarks that have the key: some may not ask for a length.
    means = {key: np.mean([one[key] for one in benchmarks if key in one], axis=0) for key in keys}
    if "aes" in means:
        means["aes"] = _scores(means)
    return means


def _scores(means: dict[str, np.ndarray]) -> np.ndarray:
    columns = (means[key] for key in ("accuracy", "tokens", "base_accuracy", "base_tokens"))
    return np.array([accuracy_efficiency_score(*row) if row[2] > 0 else np.nan for row in zip(*columns, strict=True)])
