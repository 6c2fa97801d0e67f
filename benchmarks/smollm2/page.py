"""Write the tables, the picture and the samples of the finished models."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from study.claims import interval
from study.records import TRAINED, Records, read_records
from study.results import Results
from study.run import VANILLA
from trainings import means_of_seeds

from step_trl.report import plot_training, read_history, whole_completions
from step_trl.report.figures import COLORS, STYLE
from step_trl.report.tables import to_markdown
from step_trl.text import visible
from step_trl.token_targets import TARGET_COLUMN

from .problems import EVALUATION, evaluation_rows


MEASURES = {"accuracy, %": ("correct", 100, 1), "tokens": ("tokens", 1, 0), "steps": ("steps", 1, 1)}
SHOWN = ("legs", "sums", "gcd")  # sets of whose first problem the completions are shown
STUDY = Path(__file__).parents[1] / "study"
LIKE = {"spo-tree": "spo-tree-128"}  # arms of the study, where names differ
SCALES = {"accuracy": 100, "tokens": 1}
INTRODUCTION = """# SmolLM2, taught and trained

`python benchmarks/smollm2` makes this page, and `benchmarks/README.md` says what follows from it. `as published` is
the model before it was taught, and `vanilla` the taught model, from which all trainings start. After ± is the standard
deviation between trainings. `samples.parquet` has all completions."""
PICTURE = "![Accuracy against tokens, and the trainings with the first seed](smollm2.png)"


def write_page(samples: pd.DataFrame, folder: Path, page: Path) -> None:
    """Write `README.md`, its picture `smollm2.png` and `samples.parquet` to `page`, and print the tables."""
    page.mkdir(parents=True, exist_ok=True)
    means = to_markdown(means_of_seeds(samples, EVALUATION, MEASURES))
    here = Results(Records(samples.assign(model=TRAINED, **{TARGET_COLUMN: pd.NA}), pd.DataFrame()))
    compared = order(here, Results(read_records(STUDY)), samples["arm"].unique())
    spent = minutes(samples, folder)
    print(means, compared, spent, sep="\n\n")
    parts = (INTRODUCTION, means, PICTURE, spent, "## Compared with the testbed", compared, completions(samples))
    (page / "README.md").write_text("\n\n".join(parts))
    samples.to_parquet(page / "samples.parquet", index=False)
    with matplotlib.rc_context(STYLE):
        draw(samples, folder).savefig(page / "smollm2.png")


def order(here: Results, testbed: Results, arms: Iterable[str]) -> str:
    """Compare all pairs of arms, here and on the testbed, as a Markdown table and a sentence."""
    like = {arm: LIKE.get(arm, arm) for arm in arms if LIKE.get(arm, arm) in testbed.samples}
    rows: dict[str, dict[str, str]] = {}
    signs = []  # of what the testbed tells: 1 if it is the same here, -1 if it is the opposite, 0 if it is not told
    for left, right in combinations(like, 2):
        row = rows[f"{right} - {left}"] = {}
        for measure, scale in SCALES.items():
            found = here.difference(right, left, measure)
            known = testbed.difference(like[right], like[left], measure)
            row[f"{measure}: here"], row[f"{measure}: testbed"] = interval(found, scale), interval(known, scale)
            if known.is_told:
                signs.append((1 if found.value * known.value > 0 else -1) if found.is_told else 0)
    table = to_markdown(pd.DataFrame.from_dict(rows, orient="index"))
    others = "".join(f"; `{arm}` is compared with `{other}`" for arm, other in like.items() if arm != other)
    told = f"Of the {len(signs)} differences that the testbed tells from chance, {signs.count(1)} have the same sign"
    told += f" here, {signs.count(-1)} the opposite one, and {signs.count(0)} cannot be told."
    return f"Differences with 95 % intervals, as in the study{others}.\n\n{table}\n\n{told}"


def minutes(samples: pd.DataFrame, folder: Path) -> str:
    """Say how long each training took."""
    arms = []
    for arm, part in samples.groupby("arm", sort=False):
        runs = [run for seed in part["seed"].unique() if (run := folder / str(arm) / str(seed)).exists()]
        seconds = [sum(log.get("step_time", 0.0) for log in read_history(run)) for run in runs]
        if seconds:
            arms.append(f"{arm} " + ", ".join(f"{one / 60:.0f}" for one in seconds))
    return f"Minutes of each training: {'; '.join(arms)}."


def draw(samples: pd.DataFrame, folder: Path) -> Figure:
    """Draw accuracy against tokens, a point per model, and the trainings with the first seed."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    scatter, accuracy, tokens = figure.subplots(1, 3)
    seed = samples["seed"].min()
    trained = [arm for arm in samples["arm"].unique() if (folder / arm / str(seed)).exists()]
    for color, arm in zip(COLORS, [VANILLA, *trained], strict=False):  # trainings are drawn from the second color on
        means = samples[samples["arm"] == arm].groupby("seed")[["tokens", "correct"]].mean()
        scatter.scatter(means["tokens"], means["correct"], color=color, label=arm)
    scatter.set(xlabel="mean tokens per completion", ylabel="accuracy")
    scatter.legend(fontsize=7)
    histories = {arm: whole_completions(read_history(folder / arm / str(seed))) for arm in trained}
    plot_training(accuracy, histories, "rewards/math_accuracy_reward/mean", "accuracy of rollouts")
    plot_training(tokens, histories, "completions/mean_length", "tokens per completion")
    return figure


def completions(samples: pd.DataFrame) -> str:
    """Return what each model, trained with the first seed, writes about the first problem of some sets."""
    questions = {name: rows[0]["question"] for name, rows in evaluation_rows(1).items() if name in SHOWN}
    first = samples[(samples["problem"] == "0") & (samples["seed"] == samples["seed"].min())]
    parts = []
    for name, question in questions.items():
        parts.append(f"### {question.splitlines()[-1]}\n")
        for row in first[first["benchmark"] == name].itertuples():
            verdict = "right" if row.correct else "wrong"
            parts.append(
                f"**{row.arm}** ({verdict}, {row.tokens} tokens)\n\n```text\n{visible(row.completion)}\n```\n"
            )
    return "## What the models write\n\n" + "\n".join(parts)
