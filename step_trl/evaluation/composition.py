"""What the semantic steps of completions are for: forward reasoning, verification, or redundancy."""

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
    Text of each semantic step. A trigger word opens the step after it; joined, the steps are the completion.

    Args:
        completion (`str`):
            Text of a completion.
        triggers (`Sequence[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            As in [`~step_trl.steps.TriggerSegmenter`], which finds the same ones in token ids.

    Returns:
        `list[str]`: one more than there are triggers; the first one is empty where a trigger opens the completion.
    """
    if isinstance(triggers, str) or not triggers or "" in triggers:
        raise ValueError(f"triggers: {triggers!r} is no list of words. Set for example {TRIGGERS!r}.")
    words = "|".join(re.escape(trigger) for trigger in sorted(triggers, key=len))
    starts = [match.start() for match in re.finditer(f"(?<![A-Za-z])(?:{words})(?![A-Za-z])", completion)]
    return [completion[start:end] for start, end in zip([0, *starts], [*starts, len(completion)], strict=True)]


def classify_testbed_steps(completion: str, solution: str) -> list[str]:
    """
    What each step of a testbed model's completion is for, by rule.

    A step's conclusion is the last result that it states ("So the answer is 7", "This gives 7") within the thought.
    What a step is for depends on the conclusions before it only:

    - `"forward"`: no step before came to a conclusion;
    - `"redundancy"`: two or more steps before came to the right conclusion: it was reached, and verified;
    - `"verification"`: else. It checks a conclusion that is wrong, or right but not yet verified, or disputed by the
      check that was made of it.

    `benchmarks/testbed.py` has no verification of a right conclusion: it counts as redundant each conclusion after the
    first right one. These are the conclusions of the steps that are redundant here, and those of the steps after the
    first right conclusion that are verifications here (one of them, where that check agrees). A last step that was
    cut off before its conclusion has a label, too; `benchmarks/testbed.py` leaves it out.

    Args:
        completion (`str`):
            Text of a completion of the testbed model.
        solution (`str`):
            The right result.

    Returns:
        `list[str]`: one label per semantic step.
    """
    if not re.fullmatch(r"\s*-?\d+\s*", solution):
        raise ValueError(f"solution: {solution!r} is no integer. Only problems of the testbed are classified by rule.")
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
    Share of the steps that have each label, per benchmark, and overall (the mean over benchmarks).

    Args:
        labels ([`~pandas.DataFrame`]):
            Result of [`StepJudge.label`], or `benchmark` and `label` of any other rows of one step each. Where it has
            a column `model`, the shares are per model.

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
        raise ValueError(f"labels: {strange[0]!r} is no label. Use {', '.join(columns)}.")
    if labels.empty:
        raise ValueError("labels: there are no rows. Pass at least one step.")
    if "model" in labels:
        models = labels.groupby("model", sort=False)
        return pd.concat({name: composition(rows.drop(columns="model")) for name, rows in models}, names=["model"])
    counts = pd.crosstab(labels["benchmark"], labels["label"], normalize="index")
    shares = counts.reindex(index=labels["benchmark"].unique(), columns=columns, fill_value=0.0)
    shares.loc["overall"] = shares.mean()
    return shares.rename_axis(index="benchmark", columns=None)
