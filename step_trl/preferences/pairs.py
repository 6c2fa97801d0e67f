"""
Pairs of rollouts, or of a rollout and a part of it, for direct preference optimisation (VerIPO, arXiv 2505.19000).

The paper names three types of pairs: accuracy, consistency and reflection. How it builds them is not published: the
rules here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..rewards import extract_answers
from ..text import THINK_END, TRIGGERS, split_steps
from .verifier import last_value


PAIR_TYPES = ("accuracy", "consistency", "reflection")
MOST_PAIRS = 2  # of a group


def preference_pairs(
    verified: pd.DataFrame,
    *,
    reuse_chosen: bool = False,
    reflection: bool = False,
    triggers: Sequence[str] = TRIGGERS,
) -> pd.DataFrame:
    """
    Pair rollouts of the same group, at most twice per group, in this order:

    1. `"accuracy"`: the shortest clean rollout is preferred to an incorrect one: to a repetitive or too long one if
       there is one, and among these to the longest.
    2. `"consistency"`: the shortest clean rollout is preferred to a correct one that is not clean, to the longest.
    3. `"reflection"`: a correct rollout whose thought corrects a wrong intermediate answer is preferred to one that
       ends its thought there, with the wrong answer.

    No rollout is used twice. A group without a clean rollout, or with clean ones only, gives none of the first two.

    Args:
        verified ([`~pandas.DataFrame`]):
            The result of [`RolloutVerifier.verify`], with `prompt`, `images` and `completion`.
        reuse_chosen (`bool`, *optional*, defaults to `False`):
            Whether the second pair may prefer the same rollout as the first.
        reflection (`bool`, *optional*, defaults to `False`):
            Whether to build pairs of the third type.
        triggers (`Sequence[str]`, *optional*):
            The words that open a step of a thought, after each of which its answer may change.

    Returns:
        [`~pandas.DataFrame`]: One row per pair: `group`, `type`, `prompt`, `images`, `chosen`, `rejected` and
        `rejected_truncated`, which says that the rejected completion has no end.
    """
    rows = [
        {"group": group, **pair}
        for group, rollouts in verified.groupby("group", sort=False)
        for pair in _pairs_of_group(rollouts, reuse_chosen, triggers if reflection else None)
    ]
    columns = ["group", "type", "prompt", "images", "chosen", "rejected", "rejected_truncated"]
    return pd.DataFrame(rows, columns=columns)


def _pairs_of_group(
    rollouts: pd.DataFrame, reuse_chosen: bool, triggers: Sequence[str] | None
) -> list[dict[str, Any]]:
    by_length = rollouts.sort_values("thought_tokens", kind="stable")
    clean = list(by_length.index[by_length["clean"]])
    bad = by_length["repetitive"] | by_length["too_long"]
    incorrect, unclean = ~by_length["correct"], by_length["correct"] & ~by_length["clean"]
    rejected = {
        "accuracy": list(by_length.index[incorrect & bad]) or list(by_length.index[incorrect]),
        "consistency": list(by_length.index[unclean]),
    }
    pairs: list[dict[str, Any]] = []
    used: set[Any] = set()
    for kind, worse in rejected.items():
        if clean and worse:
            better = clean[0] if reuse_chosen else clean.pop(0)
            pairs.append(_pair(kind, rollouts.loc[better], rollouts.loc[worse[-1]]))
            used |= {better, worse[-1]}
    if triggers is not None and len(pairs) < MOST_PAIRS:
        free = by_length[by_length["correct"] & ~by_length.index.isin(used)]
        pairs += _reflections(free, triggers, MOST_PAIRS - len(pairs))
    return pairs


def _pair(kind: str, chosen: pd.Series, rejected: pd.Series) -> dict[str, Any]:
    return {
        "type": kind,
        "prompt": chosen["prompt"],
        "images": chosen["images"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "rejected_truncated": bool(rejected["truncated"]),
    }


def _reflections(rollouts: pd.DataFrame, triggers: Sequence[str], most: int) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = []
    for _, rollout in rollouts.iterrows():
        cut = cut_at_wrong_answer(rollout["completion"], rollout["answer"], triggers)
        if cut is not None and len(pairs) < most:
            pairs.append(_pair("reflection", rollout, pd.Series({**rollout, "completion": cut, "truncated": False})))
    return pairs


def cut_at_wrong_answer(completion: str, answer: str | None, triggers: Sequence[str] = TRIGGERS) -> str | None:
    r"""
    Return a completion that ends its thought at a wrong intermediate answer, which is its answer then.

    An intermediate answer is the last boxed value, or else the last number, before a trigger word. `answer` is the
    right one, and that of the completion. The result is `None` if no intermediate answer differs from it, or if the
    completion's answer does not quote it.

    Example:
    ```python
    >>> cut_at_wrong_answer(r"It is 5. Wait, it is 4.</think>\boxed{4}", "4")
    'It is 5. </think>\\boxed{5}'
    ```
    """
    thought, end, rest = completion.partition(THINK_END)
    if not end or answer is None or answer not in rest:
        return None
    seen = ""  # the thought up to a trigger word
    for step in split_steps(thought, triggers)[:-1]:
        seen += step
        value, _ = last_value(step)
        if value is not None and value != answer and extract_answers([rf"\boxed{{{value}}}"]) != [answer]:
            before, _, after = rest.rpartition(answer)
            return seen + end + before + value + after
    return None


def summarize_verification(verified: pd.DataFrame, pairs: pd.DataFrame | None = None) -> dict[str, Any]:
    """
    Return shares of verified rollouts, and the number of pairs by type.

    Args:
        verified ([`~pandas.DataFrame`]):
            The result of [`RolloutVerifier.verify`].
        pairs ([`~pandas.DataFrame`], *optional*):
            The result of [`preference_pairs`].
    """
    shares = {"accuracy": "correct", "repetition": "repetitive", "length violations": "too_long", "clean": "clean"}
    figures: dict[str, Any] = {"rollouts": len(verified), "groups": int(verified["group"].nunique())}
    figures |= {name: float(verified[column].mean()) for name, column in shares.items()}
    figures["inconsistency"] = float((~verified["consistent"]).mean())
    if pairs is not None:
        figures |= {f"{kind} pairs": int((pairs["type"] == kind).sum()) for kind in PAIR_TYPES}
    return figures
