"""What the runs of the study came to: samples and histories, pooled over seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluation import summarize
from ..report import read_history
from .run import SAMPLES, VANILLA


RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """Between two arms, overall, with its 95 % interval."""

    value: float
    low: float
    high: float


class Results:
    """
    All that is done of a study.

    Args:
        folder (`Path`):
            Of the study.

    Attributes:
        seeds (`dict[str, list[int]]`):
            Seeds of each arm that are done, that of the vanilla model included.
        samples (`dict[str, DataFrame]`):
            Of each arm, all seeds together: a sample of another seed is one more sample of the problem.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.seeds: dict[str, list[int]] = {}
        self.samples: dict[str, pd.DataFrame] = {}
        for path in sorted(folder.glob("*/samples")) + sorted(folder.glob("*/*/samples")):
            name, seed = path.relative_to(folder).parts[0], path.parent.name
            parts = [pd.read_parquet(file) for file in sorted(path.glob("samples-*.parquet"))]
            rows = pd.concat(parts) if parts else pd.DataFrame(columns=["sample"])
            number = len(self.seeds.setdefault(name, []))
            self.seeds[name].append(0 if name == VANILLA else int(seed))
            rows["sample"] += number * SAMPLES
            self.samples[name] = pd.concat([self.samples[name], rows]) if name in self.samples else rows
        whole = len(self.samples.get(VANILLA, ()))
        for name in list(self.samples):
            if len(self.samples[name]) != whole * len(self.seeds[name]):
                del self.samples[name], self.seeds[name]  # its evaluation is under way

    def table(self, name: str) -> pd.DataFrame:
        """[`~step_trl.evaluation.summarize`] of an arm, relative to the vanilla model."""
        return summarize(self.samples[name], self.samples[VANILLA], resamples=RESAMPLES)

    def spread(self, name: str, measure: str) -> float:
        """Standard deviation over seeds of the overall value; NaN for one seed."""
        rows = self.samples[name]
        column = {"accuracy": "correct"}.get(measure, measure)
        seeds = rows["sample"] // SAMPLES
        means = rows.astype({"correct": float}).groupby([seeds, rows["benchmark"]])[column].mean()
        return float(means.groupby(level=0).mean().std())

    def difference(self, left: str, right: str, measure: str) -> Difference:
        """Of the overall `"accuracy"`, `"tokens"` or `"steps"`, over resamples of the problems."""
        column = {"accuracy": "correct"}.get(measure, measure)
        means = [
            self.samples[name].astype({"correct": float}).groupby(["benchmark", "problem"])[column].mean()
            for name in (left, right)
        ]
        generator = np.random.default_rng(0)
        estimates = []
        for _, problems in (means[0] - means[1]).groupby(level="benchmark"):
            values = problems.to_numpy()
            places = generator.integers(len(values), size=(RESAMPLES, len(values)))
            estimates.append([values.mean(), *values[places].mean(axis=1)])
        overall = np.mean(estimates, axis=0)
        return Difference(overall[0], *np.quantile(overall[1:], [0.025, 0.975]))

    def history(self, name: str, seed: int) -> list[dict[str, float]]:
        return read_history(self.folder / name / str(seed) / "model")

    def phases(self, name: str) -> pd.DataFrame:
        """Mean seconds per update and phase of the first and the last tenth of the updates, over seeds."""
        parts = []
        for seed in self.seeds[name]:
            path = self.folder / name / str(seed) / "model" / "phases.json"
            updates = pd.DataFrame(json.loads(path.read_text())["updates"]).fillna(0.0)
            few = max(1, len(updates) // 10)
            parts.append(pd.DataFrame({"early": updates.head(few).mean(), "late": updates.tail(few).mean()}))
        return pd.concat(parts).groupby(level=0).mean().T

    def seconds(self) -> float:
        """Of all trainings."""
        return sum(json.loads(path.read_text())["seconds"] for path in self.folder.glob("*/*/model/phases.json"))
