"""What the runs of the study came to: samples and histories, pooled over seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .. import testbed
from ..evaluation import classify_testbed_steps, read_samples, summarize
from ..report import read_history
from .run import SAMPLES, VANILLA


RESAMPLES = 2000
COLUMNS = {"accuracy": "correct"}  # of the samples, where a measure is called otherwise


@dataclass(frozen=True)
class Difference:
    """Between two arms, overall, with its 95 % interval."""

    value: float
    low: float
    high: float


def step_labels(samples: pd.DataFrame) -> list[list[str]]:
    """What each step of each completion is for, see [`~step_trl.evaluation.classify_testbed_steps`]."""
    solutions = {name: testbed.load_dataset(name)["solution"] for name in samples["benchmark"].unique()}
    rows = samples[["benchmark", "problem", "completion"]].itertuples(index=False)
    return [classify_testbed_steps(text, solutions[name][int(problem)]) for name, problem, text in rows]


def _overall(samples: pd.DataFrame) -> pd.Series:
    """Means of `accuracy` and `tokens` over benchmarks."""
    rows = samples.rename(columns={"correct": "accuracy"}).astype({"accuracy": float})
    return rows.groupby("benchmark")[["accuracy", "tokens"]].mean().mean()


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
        self._labels: dict[str, list[list[str]]] = {}
        whole = len(read_samples(folder / VANILLA / "samples"))
        for path in [folder / VANILLA / "samples", *sorted(folder.glob("*/*/samples"))]:
            name, seed = path.relative_to(folder).parts[0], path.parent.name
            rows = read_samples(path)
            if len(rows) != whole:
                continue  # its evaluation is under way
            number = len(self.seeds.setdefault(name, []))
            self.seeds[name].append(0 if name == VANILLA else int(seed))
            rows["sample"] += number * SAMPLES
            self.samples[name] = pd.concat([self.samples[name], rows]) if name in self.samples else rows

    def table(self, name: str) -> pd.DataFrame:
        """[`~step_trl.evaluation.summarize`] of an arm, relative to the vanilla model."""
        return summarize(self.samples[name], self.samples[VANILLA], resamples=RESAMPLES)

    def spread(self, name: str, measure: str, benchmark: str | None = None) -> float:
        """Standard deviation from training to training of an arm's mean, see [`Results.difference`]; NaN for one."""
        values = self._values(name, measure, benchmark)
        means = values.groupby(["number", "benchmark"])["value"].mean()
        return float(means.groupby(level="number").mean().std())

    def pooled_spread(self, measure: str, benchmark: str | None = None) -> float:
        """
        The same of a usual arm, from all that were trained with several seeds; NaN for none.

        It is the median, so that a few unstable arms do not speak for the others. A variance of f degrees of freedom
        is distributed as chi-squared over f, whose median is about (1 - 2 / 9f)^3 (Wilson and Hilferty).
        """
        freedom = {name: len(seeds) - 1 for name, seeds in self.seeds.items() if len(seeds) > 1}
        variances = [
            self.spread(name, measure, benchmark) ** 2 / (1 - 2 / (9 * number)) ** 3
            for name, number in freedom.items()
        ]
        return float(np.sqrt(np.median(variances))) if variances else np.nan

    def difference(self, left: str, right: str, measure: str, benchmark: str | None = None) -> Difference:
        """
        Of the `"accuracy"`, `"tokens"`, `"steps"` or `"redundancy"` of two arms.

        The interval knows two sources of chance: problems, which are resampled, and trainings, for which normal noise
        is added. Few seeds tell little of an arm's own spread, so that noise has the pooled one, or the own one where
        that is larger, over the root of the number of seeds; the vanilla model has none.

        Args:
            left (`str`), right (`str`):
                Arms.
            measure (`str`):
                `"redundancy"` is the share of a completion's steps that are redundant.
            benchmark (`str`, *optional*):
                One of them; by default the mean over all.
        """
        means = [
            self._values(name, measure, benchmark).groupby(["benchmark", "problem"])["value"].mean()
            for name in (left, right)
        ]
        generator = np.random.default_rng(0)
        estimates = []
        for _, problems in (means[0] - means[1]).groupby(level="benchmark"):
            values = problems.to_numpy()
            places = generator.integers(len(values), size=(RESAMPLES, len(values)))
            estimates.append([values.mean(), *values[places].mean(axis=1)])
        overall = np.mean(estimates, axis=0)
        usual = np.nan_to_num(self.pooled_spread(measure, benchmark))
        variances = [
            np.fmax(usual, self.spread(name, measure, benchmark)) ** 2 / len(self.seeds[name])
            for name in (left, right)
            if name != VANILLA
        ]
        resamples = overall[1:] + np.sqrt(sum(variances)) * generator.standard_normal(RESAMPLES)
        return Difference(overall[0], *np.quantile(resamples, [0.025, 0.975]))

    def labels(self, name: str) -> list[list[str]]:
        """[`step_labels`] of an arm's samples."""
        if name not in self._labels:
            self._labels[name] = step_labels(self.samples[name])
        return self._labels[name]

    def _values(self, name: str, measure: str, benchmark: str | None) -> pd.DataFrame:
        """`value` of each sample, with its benchmark and problem and the `number` of its training."""
        rows = self.samples[name]
        if measure == "redundancy":
            values = np.array([labels.count("redundancy") / len(labels) for labels in self.labels(name)])
        else:
            values = rows[COLUMNS.get(measure, measure)].to_numpy(float)
        values = rows[["benchmark", "problem"]].assign(value=values, number=rows["sample"] // SAMPLES)
        return values if benchmark is None else values[values["benchmark"] == benchmark]

    def history(self, name: str, seed: int) -> list[dict[str, float]]:
        return read_history(self.folder / name / str(seed) / "model")

    def progress(self, name: str, seed: int) -> pd.DataFrame:
        """Overall accuracy and tokens by update, from the vanilla model to the trained one."""
        own = self.folder / name / str(seed)
        last = max(entry["step"] for entry in self.history(name, seed))
        folders = {int(path.name): path for path in own.glob("checkpoints/*")} | {last: own / "samples"}
        samples = {0: self.samples[VANILLA]} | {update: read_samples(folders[update]) for update in sorted(folders)}
        return pd.DataFrame({update: _overall(rows) for update, rows in samples.items()}).T

    def before(self, name: str) -> pd.Series:
        """Overall accuracy and tokens of the models that an arm starts from, under the arm's own prompts."""
        rows = pd.concat([read_samples(self.folder / name / str(seed) / "before") for seed in self.seeds[name]])
        return _overall(rows)

    def phases(self, name: str) -> pd.DataFrame:
        """
        Mean seconds per update and phase of the first and the last tenth of the updates.

        Of the seed whose training was the fastest: beside the others, this machine may have done other work.
        """
        timings = [
            json.loads((self.folder / name / str(seed) / "model" / "phases.json").read_text())
            for seed in self.seeds[name]
        ]
        updates = pd.DataFrame(min(timings, key=lambda timing: timing["seconds"])["updates"]).fillna(0.0)
        few = max(1, len(updates) // 10)
        return pd.DataFrame({"early": updates.head(few).mean(), "late": updates.tail(few).mean()}).T

    def cut_off(self, context: int) -> float:
        """Share of the vanilla model's correct completions with more tokens than `context`."""
        rows = self.samples[VANILLA]
        return float((rows.loc[rows["correct"].astype(bool), "tokens"] > context).mean())

    def without_texts(self) -> pd.DataFrame:
        """All samples of all arms, with the seed of the training."""
        parts = []
        for name, rows in self.samples.items():
            seeds = [self.seeds[name][number] for number in rows["sample"] // SAMPLES]
            columns = rows[["benchmark", "problem", "correct", "tokens", "steps", "finish_reason"]]
            parts.append(columns.assign(arm=name, seed=seeds, sample=rows["sample"] % SAMPLES))
        return pd.concat(parts, ignore_index=True).astype({"tokens": "int32", "steps": "int16", "problem": "int16"})

    def seconds(self) -> float:
        """Of all trainings."""
        return sum(json.loads(path.read_text())["seconds"] for path in self.folder.glob("*/*/model/phases.json"))
