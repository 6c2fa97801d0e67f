"""What the runs of the study came to: samples and histories, pooled over seeds."""

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


RESAMPLES = 2000  # of a table
DRAWS = 20_000  # of a difference, whose interval may end near 0
OLD = "†"  # marks arms that are to be run again
COLUMNS = {"accuracy": "correct"}  # of the samples, where a measure is called otherwise


@dataclass(frozen=True)
class Difference:
    """Between two arms, overall, with its 95 % interval."""

    value: float
    low: float
    high: float


def _overall(samples: pd.DataFrame) -> pd.Series:
    """Means of `accuracy` and `tokens` over benchmarks."""
    rows = samples.rename(columns={"correct": "accuracy"}).astype({"accuracy": float})
    return rows.groupby("benchmark")[["accuracy", "tokens"]].mean().mean()


class Results:
    """
    All that is known of a study, by arm.

    Args:
        records ([`~study.records.Records`]):
            Of all trainings.
        old (`Container[str]`, *optional*):
            Arms that have other settings by now, and are to be run again.

    Attributes:
        seeds (`dict[str, list[int]]`):
            Seeds of each arm that are done, that of the vanilla model included.
        samples (`dict[str, DataFrame]`):
            Of each arm's trained models, all seeds together: a sample of another seed is one more sample of the
            problem.
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
        """The name of an arm, or another text for it, with a mark if it is an old one."""
        return (name if text is None else text) + f" {OLD}" * (name in self.old)

    def table(self, name: str) -> pd.DataFrame:
        """[`~step_trl.evaluation.summarize`] of an arm, relative to the vanilla model."""
        return summarize(self.samples[name], self.samples[VANILLA], resamples=RESAMPLES)

    def spread(self, name: str, measure: str, benchmark: str | None = None) -> float:
        """Standard deviation from training to training of an arm's mean, see [`Results.difference`]; NaN for one."""
        return float(self._means(name, measure, benchmark).std())

    def trainings(self, name: str, measure: str, benchmark: str | None = None) -> int:
        """Number of those of an arm whose measure is known."""
        return len(self._means(name, measure, benchmark))

    def pooled_spread(self, measure: str, benchmark: str | None = None) -> float:
        """
        The same of a usual arm, from all that were trained with several seeds; NaN for none.

        It is the median, so that a few unstable arms do not speak for the others. A variance of f degrees of freedom
        is distributed as chi-squared over f, whose median is about (1 - 2 / 9f)^3 (Wilson and Hilferty).
        """
        means = [self._means(name, measure, benchmark) for name in self.samples]
        variances = [values.var() / (1 - 2 / (9 * (len(values) - 1))) ** 3 for values in means if len(values) > 1]
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
        # Both signs, so that the difference the other way round has the same interval.
        resamples = np.concatenate([overall[1:] + noise, overall[1:] - noise])
        return Difference(overall[0], *np.quantile(resamples, [0.025, 0.975]))

    def labels(self, name: str) -> pd.DataFrame:
        """One row per step of an arm's samples, as far as they are known, for [`~step_trl.evaluation.composition`]."""
        rows = self.samples[name].dropna(subset=list(LABELS))
        steps = [rows.loc[rows.index.repeat(rows[label]), ["benchmark"]].assign(label=label) for label in LABELS]
        return pd.concat(steps)

    def history(self, name: str) -> list[dict[str, float]]:
        """What is logged of an arm's first training that has a log, as `trainer.state.log_history`; else nothing."""
        rows = self._updates(name)
        rows = rows[rows["seed"] == rows["seed"].min()]
        return rows.rename(columns={"number": "step"})[["step", *CURVES]].to_dict("records")

    def progress(self, name: str) -> pd.DataFrame:
        """Overall accuracy and tokens by update, from the vanilla model to an arm's first trained one."""
        seed, samples = self.seeds[name][0], self.records.samples
        rows = samples[(samples["arm"] == name) & (samples["seed"] == seed)]
        models = {str(model): part for model, part in rows.groupby("model") if model != BEFORE}
        last = {int(self._updates(name)["number"].max()): models.pop(TRAINED)}
        steps = {0: self.samples[VANILLA]} | {int(model): part for model, part in models.items()} | last
        return pd.DataFrame({update: _overall(steps[update]) for update in sorted(steps)}).T

    def before(self, name: str) -> tuple[int, pd.Series]:
        """
        Number of seeds whose start is known, and the overall accuracy and tokens of these models that the arm starts
        from, under its prompts.
        """
        samples = self.records.samples
        rows = samples[(samples["arm"] == name) & (samples["model"] == BEFORE)]
        return rows["seed"].nunique(), _overall(rows)

    def phases(self, name: str) -> pd.DataFrame:
        """
        Mean seconds per update and phase of the first and the last tenth of the updates, empty where none are known.

        Of the training that was the fastest: beside the others, its machine may have done other work.
        """
        rows = self._updates(name)
        if rows.empty:
            return pd.DataFrame()
        updates = rows.loc[rows["seed"] == self.seconds()[name].idxmin(), list(PHASES)].fillna(0.0)
        few = max(1, len(updates) // 10)
        return pd.DataFrame({"early": updates.head(few).mean(), "late": updates.tail(few).mean()}).T

    def seconds(self) -> pd.Series:
        """Of all updates of each training that has a log, by arm and seed."""
        return self.records.updates.groupby(TRAINING)[list(PHASES)].sum().sum(axis=1)

    def cut_off(self, context: int) -> float:
        """Share of the vanilla model's correct completions with more tokens than `context`."""
        rows = self.samples[VANILLA]
        return float((rows.loc[rows["correct"].astype(bool), "tokens"] > context).mean())

    def _values(self, name: str, measure: str, benchmark: str | None) -> pd.DataFrame:
        """
        `value` of each sample that it is known of, with its benchmark and problem and the `number` of its training.
        """
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
        """Mean of each training, over benchmarks."""
        key = (name, measure, benchmark)
        if key not in self._known_means:  # each difference needs those of all arms
            means = self._values(*key).groupby(["number", "benchmark"])["value"].mean()
            self._known_means[key] = means.groupby(level="number").mean()
        return self._known_means[key]

    def _updates(self, name: str) -> pd.DataFrame:
        rows = self.records.updates
        return rows[rows["arm"] == name]
