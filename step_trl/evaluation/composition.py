"""Purposes of the semantic steps of completions: forward reasoning, verification or redundancy."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from ..text import THINK_END, TRIGGERS


LABELS = ("forward", "verification", "redundancy")
UNKNOWN = "unknown"
_CONCLUSION = re.compile(r"(?:So the answer is|This gives) (\d+)")


def split_steps(completion: str, triggers: Sequence[str] = TRIGGERS) -> list[str]:
    """
    Split a completion into semantic steps. Each trigger word opens a step.

    Args:
        completion (`str`):
            Text of a completion.
        triggers (`Sequence[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            Trigger words, as in [`~step_trl.steps.TriggerSegmenter`], which finds them in token ids.

    Returns:
        `list[str]`: the steps, one more than there are triggers. The first step is empty if a trigger opens the
        completion.
    """
    if isinstance(triggers, str) or not triggers or "" in triggers:
        raise ValueError(f"triggers: {triggers!r} is not a list of words. Set for example {TRIGGERS!r}.")
    words = "|".join(re.escape(trigger) for trigger in sorted(triggers, key=len))
    starts = [match.start() for match in re.finditer(f"(?<![A-Za-z])(?:{words})(?![A-Za-z])", completion)]
    return [completion[start:end] for start, end in zip([0, *starts], [*starts, len(completion)], strict=True)]


def classify_testbed_steps(completion: str, solution: str) -> list[str]:
    """
    Label the steps of a testbed model's completion by rule.

    The conclusion of a step is the last result that it states ("So the answer is 7", "This gives 7") within the
    thought. The label of a step depends only on earlier conclusions:

    - `"forward"`: there is no earlier conclusion.
    - `"redundancy"`: at least two earlier conclusions are right, so the result was reached and verified.
    - `"verification"`: otherwise. The step checks a conclusion that is wrong, not yet verified, or disputed.

    `benchmarks/testbed.py` counts every conclusion after the first right one as redundant, verifications included. It
    ignores a last step that was cut off before its conclusion, which has a label here.

    Args:
        completion (`str`):
            Text of a completion of the testbed model.
        solution (`str`):
            The right result.

    Returns:
        `list[str]`: one label per semantic step.
    """
    if not re.fullmatch(r"\s*-?\d+\s*", solution):
        raise ValueError(f"solution: {solution!r} is not an integer. Only testbed problems are labelled by rule.")
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
    Compute the share of each label among the steps, per benchmark and overall (the mean over benchmarks).

    Args:
        labels ([`~pandas.DataFrame`]):
            Result of [`StepJudge.label`], or one row per step with `benchmark` and `label`. With a column `model`, the
            shares are per model.

    Returns:
        [`~pandas.DataFrame`]: indexed by `benchmark` (or `model` and `benchmark`) in the order of the rows,
        `"overall"` last, with `forward`, `verification`, `redundancy` and `unknown`, which sum to 1.
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
