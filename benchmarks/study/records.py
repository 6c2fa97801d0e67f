"""The records of each training. They are stored next to the page, so that another machine can resume a study."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from step_trl import testbed
from step_trl.evaluation import classify_testbed_steps, read_samples
from step_trl.evaluation.composition import LABELS
from step_trl.files import atomic_write
from step_trl.preferences import agree
from step_trl.report import read_history
from step_trl.rewards import extract_answers
from step_trl.thoughts import skipped_thoughts, split_thought
from step_trl.token_targets import TARGET_COLUMN

from .run import VANILLA, whole_evaluation


TRAINED, BEFORE = "trained", "before"  # the models of samples; others are checkpoints, named by their update
LENGTH = "completions/mean_length"
CURVES = {
    "rewards/math_accuracy_reward/mean": "accuracy of rollouts",
    LENGTH: "tokens per rollout",
    "kl": "KL to the vanilla model",
    "entropy": "entropy",
}
PHASES = ("generation", "reward", "old", "reference", "update")
TRAINING = ["arm", "seed"]
KINDS = {  # the types of the columns that are kept of a sample
    "benchmark": "str",
    "problem": "int16",
    "sample": "int16",
    "correct": "bool",
    "tokens": "int32",
    "steps": "int16",
    "finish_reason": "str",
    TARGET_COLUMN: "Int32",
}
THOUGHTS = ["skipped", "inconsistent"]
OF_SAMPLES, OF_UPDATES = [*KINDS, *LABELS, *THOUGHTS, *TRAINING, "model"], [*CURVES, *PHASES, *TRAINING, "number"]


@dataclass(frozen=True)
class Records:
    """
    All that is known about the trainings of a study.

    Attributes:
        samples (`DataFrame`):
            One row per sample, with `arm` and `seed` of the training and the `model`, which is `"trained"`, `"before"`
            (before the training, with its prompts) or an update. The numbers of `forward`, `verification` and
            `redundancy` steps, see [`~step_trl.evaluation.classify_testbed_steps`], are missing if its text was lost,
            and so is whether its thought is `skipped`, or `inconsistent` with its answer.
        updates (`DataFrame`):
            One row per update, with `arm`, `seed` and its `number` (from 1), the logged metrics in `CURVES` and the
            seconds of `PHASES`.
    """

    samples: pd.DataFrame
    updates: pd.DataFrame

    @property
    def done(self) -> set[tuple[str, int]]:
        """Arms and seeds whose trained models are evaluated, the vanilla model with seed 0."""
        trained = self.samples.loc[self.samples["model"] == TRAINED, TRAINING].drop_duplicates()
        return {(str(arm), int(seed)) for arm, seed in trained.itertuples(index=False)}

    def without(self, arms: Collection[str]) -> Records:
        """Return the records of all other arms."""
        return Records(*(rows[~rows["arm"].isin(list(arms))] for rows in (self.samples, self.updates)))

    def updated_by(self, newer: Records) -> Records:
        """Merge with newer records, which win for trainings that are in both."""
        samples, updates = (
            rows[~pd.MultiIndex.from_frame(rows[TRAINING]).isin(list(newer.done))]
            for rows in (self.samples, self.updates)
        )
        return Records(
            _join([samples, newer.samples], OF_SAMPLES),
            _join([updates, newer.updates], OF_UPDATES),
        )


def read_records(page: Path) -> Records:
    """Read the records next to a page, which are empty if there are none."""
    tables = []
    for path, columns in ((page / "samples.parquet", OF_SAMPLES), (page / "updates.parquet", OF_UPDATES)):
        tables.append(_join([pd.read_parquet(path)] if path.exists() else [], columns))
    return Records(*tables)


def write_records(records: Records, page: Path) -> None:
    for name in ("samples", "updates"):
        with atomic_write(page / f"{name}.parquet") as partial:
            getattr(records, name).to_parquet(partial, compression="zstd", index=False)


def collect_records(folder: Path) -> Records:
    """Collect the records of all evaluated trainings in the folder of a study."""
    samples, updates = [], []
    for arm, seed, own in _trainings(folder):
        trained = read_samples(own / "samples")
        if len(trained) != whole_evaluation():
            continue
        models = {TRAINED: trained, BEFORE: read_samples(own / "before")}
        models |= {path.name: read_samples(path) for path in own.glob("checkpoints/*")}
        for model, rows in models.items():
            if len(rows):
                samples.append(_summary(rows).assign(arm=arm, seed=seed, model=model))
        updates.append(_updates(own / "model").assign(arm=arm, seed=seed))
    return Records(_join(samples, OF_SAMPLES), _join(updates, OF_UPDATES))


def _join(parts: Sequence[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """Concatenate all rows, or return an empty frame with these columns."""
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _trainings(folder: Path) -> Iterator[tuple[str, int, Path]]:
    yield VANILLA, 0, folder / VANILLA
    for path in sorted(folder.glob("*/*/samples")):
        yield path.parent.parent.name, int(path.parent.name), path.parent


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return samples without their texts, but with the numbers of their steps of each kind."""
    solutions = {name: testbed.load_dataset(name)["solution"] for name in rows["benchmark"].unique()}
    texts = rows[["benchmark", "problem", "completion"]].itertuples(index=False)
    labels = [classify_testbed_steps(text, solutions[name][int(problem)]) for name, problem, text in texts]
    counts = {label: pd.array([row.count(label) for row in labels], dtype="Int16") for label in LABELS}
    thoughts = [split_thought(text)[0] for text in rows["completion"]]
    answers = extract_answers(rows["completion"].tolist(), require_end_of_thinking=True)
    inconsistent = [not same for same in agree(thoughts, answers)]
    verdicts = {"skipped": skipped_thoughts(rows["completion"].tolist()), "inconsistent": inconsistent}
    flags = {name: pd.array(values, dtype="boolean") for name, values in verdicts.items()}
    return rows.reindex(columns=list(KINDS)).astype(KINDS).assign(**counts, **flags)


def _updates(model: Path) -> pd.DataFrame:
    """Return the log and the seconds of each update, none for a model that was trained by SFT."""
    timing = model / "phases.json"
    seconds = json.loads(timing.read_text())["updates"] if timing.exists() else []
    if not seconds:
        return pd.DataFrame()
    stages = [*sorted(model.glob("stage-*")), model]
    log = [entry for stage in stages for entry in read_history(stage) if LENGTH in entry]
    parts = pd.DataFrame(log, columns=list(CURVES)), pd.DataFrame(seconds, columns=list(PHASES))
    return pd.concat(parts, axis=1).astype("float32").assign(number=range(1, len(seconds) + 1))
