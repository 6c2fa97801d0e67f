"""The results of the study: samples and histories, pooled over seeds."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import pandas as pd

from step_trl.evaluation import summarize
from step_trl.evaluation.composition import LABELS
from step_trl.token_targets import TARGET_COLUMN

from .records import BEFORE, CURVES, PHASES, TRAINED, TRAINING, Records
from .run import SAMPLES, VANILLA


RESAMPLES = 2000  # for the intervals of a table
DRAWS = 20_000  # for a difference, whose interval may end near 0
OLD = "†"  # marks arms that are to be run again
COLUMNS = {"accuracy": "correct"}  # columns of the samples whose name differs from the measure's


@dataclass(frozen=True)
class Difference:
    """The overall difference between two arms, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low * self.high > 0


def overall_means(samples: pd.DataFrame) -> pd.Series:
    """Return the means of `accuracy` and `tokens` over benchmarks."""
    rows = samples.rename(columns={"correct": "accuracy"}).astype({"accuracy": float})
    return rows.groupby("benchmark")[["accuracy", "tokens"]].mean().mean()


class Results:
    """
    All results of a study, by arm. `old` are arms whose settings have changed, and which have to be run again.

    Attributes:
        seeds (`dict[str, list[int]]`):
            The finished seeds of each arm, including the vanilla model.
        samples (`dict[str, DataFrame]`):
            The samples of each arm's trained models, with all seeds together: a sample with another seed is another
            sample of the problem.
    """

    def __init__(self, records: Records, old: Container[str] = ()):
        self.records = records
        self.old = old
        self.seeds: dict[str, list[int]] = {}
        self.samples: dict[str, pd.DataFrame] = {}
        self._known_means: dict[tuple[str, str, str | None], pd.Series] = {}
        trained = records.samples[records.samples["model"] == TRAINED]
        for name, rows in trained.groupby("arm"):
            self.seeds[str(name)] = sorted(map(int, rows["seed"].unique()))
            number = rows["seed"].map(self.seeds[str(name)].index)
            rows = rows.assign(sample=rows["sample"] + number * SAMPLES)
            self.samples[str(name)] = rows.drop(columns=TARGET_COLUMN) if rows[TARGET_COLUMN].isna().all() else rows

    def marked(self, name: str, text: str | None = None) -> str:
        """Return the name of an arm, or another text for it, with a mark if the arm is old."""
        return (name if text is None else text) + f" {OLD}" * (name in self.old)

    def table(self, name: str) -> pd.DataFrame:
        """Return [`~step_trl.evaluation.summarize`] of an arm, relative to the vanilla model."""
        return summarize(self.samples[name], self.samples[VANILLA], resamples=RESAMPLES)

    def at_budget(self, name: str, tokens: int) -> pd.Series:
        """
        Return overall accuracy and tokens of an arm if completions end after `tokens` tokens.

        Sampling goes from left to right, so that these are its completions cut off there. What is cut off is wrong.
        """
        rows = self.samples[name]
        correct = rows["correct"] & (rows["tokens"] <= tokens)
        return overall_means(rows.assign(correct=correct, tokens=rows["tokens"].clip(upper=tokens)))

    def spread(self, name: str, measure: str, benchmark: str | None = None) -> float:
        """Return the standard deviation of an arm's mean between trainings, NaN for one training."""
        return float(self._means(name, measure, benchmark).std())

    def trainings(self, name: str, measure: str, benchmark: str | None = None) -> int:
        """Return the number of an arm's trainings for which the measure is known."""
        return len(self._means(name, measure, benchmark))

    def pooled_spread(self, measure: str, benchmark: str | None = None) -> float:
        """
        Return the spread of a typical arm, from all arms that were trained with several seeds; NaN if there are none.

        It is a median, so that a few unstable arms do not determine it. A variance of f degrees of freedom is
        distributed as chi-squared over f, whose median is about (1 - 2 / 9f)^3 (Wilson and Hilferty).
        """
        means = [self._means(name, measure, benchmark) for name in self.samples]
        variances = [values.var() / (1 - 2 / (9 * (len(values) - 1))) ** 3 for values in means if len(values) > 1]
        return float(np.sqrt(np.median(variances))) if variances else np.nan

    def difference(self, left: str, right: str, measure: str, benchmark: str | None = None) -> Difference:
        """
        Return the difference between two arms in `"accuracy"`, `"tokens"`, `"steps"`, `"redundancy"`, `"skipped"` or
        `"inconsistent"`.

        The interval includes two sources of chance: problems, which are resampled, and trainings, for which normal
        noise is added. A few seeds say little about an arm's own spread, so the noise has the pooled spread, or the
        arm's own if that is larger, divided by the root of the number of seeds. The vanilla model has no such noise.

        `"redundancy"` is the share of a completion's steps that are redundant. Without a benchmark, the difference is
        the mean over all.
        """
        means = [
            self._values(name, measure, benchmark).groupby(["benchmark", "problem"])["value"].mean()
            for name in (left, right)
        ]
        generator = np.random.default_rng(0)
        estimates = []
        for _, problems in (means[0] - means[1]).groupby(level="benchmark"):
            values = problems.to_numpy()
            places = generator.integers(len(values), size=(DRAWS, len(values)))
            estimates.append([values.mean(), *values[places].mean(axis=1)])
        overall = np.mean(estimates, axis=0)
        usual = np.nan_to_num(self.pooled_spread(measure, benchmark))
        variances = [
            np.fmax(usual, self.spread(name, measure, benchmark)) ** 2 / self.trainings(name, measure, benchmark)
            for name in (left, right)
            if name != VANILLA
        ]
        noise = np.sqrt(sum(variances)) * generator.standard_normal(DRAWS)
        # Both signs are used, so that the opposite difference has the same interval.
        resamples = np.concatenate([overall[1:] + noise, overall[1:] - noise])
        return Difference(overall[0], *np.quantile(resamples, [0.025, 0.975]))

    def share(self, name: str, measure: str, benchmark: str | None = None) -> float:
        """Return the mean of a measure over benchmarks and trainings, NaN if it is not known."""
        return float(self._means(name, measure, benchmark).mean())

    def labels(self, name: str) -> pd.DataFrame:
        """Return one row per step of an arm's samples, if known, for [`~step_trl.evaluation.composition`]."""
        rows = self.samples[name].dropna(subset=list(LABELS))
        steps = [rows.loc[rows.index.repeat(rows[label]), ["benchmark"]].assign(label=label) for label in LABELS]
        return pd.concat(steps)

    def history(self, name: str) -> list[dict[str, float]]:
        """Return the log of an arm's first training that has one, as `trainer.state.log_history`."""
        rows = self._updates(name)
        rows = rows[rows["seed"] == rows["seed"].min()]
        return rows.rename(columns={"number": "step"})[["step", *CURVES]].to_dict("records")

    def progress(self, name: str) -> pd.DataFrame:
        """Return overall accuracy and tokens by update, from the vanilla model to an arm's first trained model."""
        seed, samples = self.seeds[name][0], self.records.samples
        rows = samples[(samples["arm"] == name) & (samples["seed"] == seed)]
        models = {str(model): part for model, part in rows.groupby("model") if model != BEFORE}
        last = {int(self._updates(name)["number"].max()): models.pop(TRAINED)}
        steps = {0: self.samples[VANILLA]} | {int(model): part for model, part in models.items()} | last
        return pd.DataFrame({update: overall_means(steps[update]) for update in sorted(steps)}).T

    def before(self, name: str) -> tuple[int, pd.Series]:
        """
        Return the number of seeds whose start is known, and the overall accuracy and tokens of the models that the arm
        starts from, with its prompts.
        """
        samples = self.records.samples
        rows = samples[(samples["arm"] == name) & (samples["model"] == BEFORE)]
        return rows["seed"].nunique(), overall_means(rows)

    def phases(self, name: str) -> pd.DataFrame:
        """
        Return mean seconds per update and phase of the first and the last tenth of the updates, empty if unknown.

        These are from the fastest training: during the others, the machine may have done other work.
        """
        rows = self._updates(name)
        if rows.empty:
            return pd.DataFrame()
        updates = rows.loc[rows["seed"] == self.seconds()[name].idxmin(), list(PHASES)].fillna(0.0)
        few = max(1, len(updates) // 10)
        return pd.DataFrame({"early": updates.head(few).mean(), "late": updates.tail(few).mean()}).T

    def seconds(self) -> pd.Series:
        """Return the seconds of all updates of each training with a log, by arm and seed."""
        return self.records.updates.groupby(TRAINING)[list(PHASES)].sum().sum(axis=1)

    def cut_off(self, context: int) -> float:
        """Return the share of the vanilla model's correct completions with more tokens than `context`."""
        rows = self.samples[VANILLA]
        return float((rows.loc[rows["correct"].astype(bool), "tokens"] > context).mean())

    def _values(self, name: str, measure: str, benchmark: str | None) -> pd.DataFrame:
        """Return the known `value` of each sample, with its benchmark and problem and the `number` of its training."""
        rows = self.samples[name]
        if measure == "redundancy":
            values = rows["redundancy"] / rows[list(LABELS)].sum(axis=1)
        else:
            values = rows[COLUMNS.get(measure, measure)]
        values = rows[["benchmark", "problem"]].assign(
            value=values.astype("Float64").to_numpy(float, na_value=np.nan), number=rows["sample"] // SAMPLES
        )
        return values[values["value"].notna() & (benchmark is None or values["benchmark"] == benchmark)]

    def _means(self, name: str, measure: str, benchmark: str | None) -> pd.Series:
        """Return the mean of each training, over benchmarks."""
        key = (name, measure, benchmark)
        if key not in self._known_means:  # each difference needs the means of all arms
            means = self._values(*key).groupby(["number", "benchmark"])["value"].mean()
            self._known_means[key] = means.groupby(level="number").mean()
        return self._known_means[key]

    def _updates(self, name: str) -> pd.DataFrame:
        rows = self.records.updates
        return rows[rows["arm"] == name]
