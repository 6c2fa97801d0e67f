"""Classify the semantic steps of completions as forward reasoning, verification or redundancy."""

from __future__ import annotations

import re

import pandas as pd

from ..text import THINK_END, split_steps


LABELS = ("forward", "verification", "redundancy")
UNKNOWN = "unknown"
_CONCLUSION = re.compile(r"(?:So the answer is|This gives) (\d+)")


def classify_testbed_steps(completion: str, solution: str) -> list[str]:
    """
    Classify each step of a testbed model's completion by rules.

    A step's conclusion is the last result that it states ("So the answer is 7", "This gives 7") within the thought.
    The label of a step depends only on the conclusions before it:

    - `"forward"`: no earlier step has a conclusion;
    - `"redundancy"`: two or more earlier steps have the right conclusion, so it was reached and verified;
    - `"verification"`: all other steps. They check a conclusion that is wrong, or right but not yet verified, or
      contradicted by the check of it.

    A last step that was cut off before its conclusion also has a label. `benchmarks/testbed.py` leaves it out, and
    counts every conclusion after the first right one as redundant.

    Args:
        completion (`str`):
            The text of a completion of the testbed model.
        solution (`str`):
            The correct result.

    Returns:
        `list[str]`: One label per semantic step.
    """
    if not re.fullmatch(r"\s*-?\d+\s*", solution):
        raise ValueError(f"solution: {solution!r} is not an integer. Only testbed problems are classified by rules.")
    thought_end = len(completion.partition(THINK_END)[0])
    labels, concluded, right, start = [], 0, 0, 0
    for step in split_steps(completion):
        labels.append("forward" if concluded == 0 else "redundancy" if right >= 2 else "verification")
        found = _CONCLUSION.findall(step[: max(0, thought_end - start)])
        if found:
            concluded += 1
            right += int(found[-1]) == int(solution)
        start += len(step)
    return labels


def composition(labels: pd.DataFrame) -> pd.DataFrame:
    """
    Compute the share of steps with each label, per benchmark and overall (the mean over benchmarks).

    Args:
        labels ([`~pandas.DataFrame`]):
            The result of [`StepJudge.label`], or any other rows of one step each with `benchmark` and `label`. If
            there is a column `model`, the shares are per model.

    Returns:
        [`~pandas.DataFrame`]: The shares `forward`, `verification`, `redundancy` and `unknown`, which sum to 1. The
        index is `benchmark` (or `model` and `benchmark`) in the order of the rows, with `"overall"` last.
    """
    columns = [*LABELS, UNKNOWN]
    missing = [column for column in ("benchmark", "label") if column not in labels]
    if missing:
        raise ValueError(f"labels: there is no column {' and '.join(missing)}. Pass the result of `StepJudge.label`.")
    strange = sorted(set(labels["label"]) - set(columns))
    if strange:
        raise ValueError(f"labels: {strange[0]!r} is not a label. Use {', '.join(columns)}.")
    if labels.empty:
        raise ValueError("labels: there are no rows. Pass at least one step.")
    if "model" in labels:
        models = labels.groupby("model", sort=False)
        return pd.concat({name: composition(rows.drop(columns="model")) for name, rows in models}, names=["model"])
    counts = pd.crosstab(labels["benchmark"], labels["label"], normalize="index")
    shares = counts.reindex(index=labels["benchmark"].unique(), columns=columns, fill_value=0.0)
    shares.loc["overall"] = shares.mean()
    return shares.rename_axis(index="benchmark", columns=None)
