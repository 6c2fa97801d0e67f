"""
The claims of the papers, and whether they hold at the testbed's scale.

The wording is ours. The papers' numbers are from their abstracts and from public reading notes, because only the
beginnings of the papers could be read here. A claim without numbers states what its table is about and is not a
quotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from step_trl.report.tables import to_markdown

from .results import Difference, Results


MARGIN = 0.02  # a smaller loss of accuracy counts as kept
Direction = Literal["higher", "lower", "kept"]


@dataclass(frozen=True)
class Claim:
    """
    A claim that an arm is `"higher"` or `"lower"` than another in a measure, or that a measure is `"kept"`.

    `source` is the paper, `paper` has its numbers for the two arms, in this order, if they are known. See
    [`Results.difference`] for `measure` and `benchmark`.
    """

    source: str
    text: str
    left: str
    right: str
    measure: str
    direction: Direction
    paper: str = ""
    benchmark: str | None = None


def verdict(difference: Difference, direction: Direction) -> str:
    """
    Judge a claim by the 95 % interval of the difference.

    A claim holds if the whole interval agrees with it, and does not hold if no part of it does. A measure is kept if
    the interval is above -[`MARGIN`], and is not kept if the interval is below 0.
    """
    low, high = difference.low, difference.high
    holds, does_not = {
        "higher": (low > 0, high <= 0),
        "lower": (high < 0, low >= 0),
        "kept": (low > -MARGIN, high < 0),
    }[direction]
    return "holds" if holds else "does not hold" if does_not else "cannot be told"


_STEP, _SAS, _SHORT_TREE = "Step-GRPO", "SAS", "SPO-tree in 128 tokens"
CLAIMS: tuple[Claim, ...] = (
    Claim(_STEP, "it uses fewer tokens than the vanilla model", "step-grpo", "vanilla", "tokens", "lower", "CR 0.68"),
    Claim(
        _STEP, "it keeps the vanilla model's accuracy", "step-grpo", "vanilla", "accuracy", "kept", "82.1, 79.9 %",
    ),
    Claim(_STEP, "it uses fewer tokens than GRPO", "step-grpo", "grpo", "tokens", "lower", "CR 0.68, 0.90"),
    Claim(_STEP, "it is more accurate than GRPO", "step-grpo", "grpo", "accuracy", "higher", "82.1, 80.9 %"),
    Claim(_STEP, "it is more accurate than GRPO in a short context", "step-grpo", "grpo-short", "accuracy", "higher"),
    Claim(_STEP, "GRPO+LP is shorter than it", "grpo-lp", "step-grpo", "tokens", "lower", "CR 0.53, 0.68"),
    Claim(_STEP, "GRPO+LP is less accurate than it", "grpo-lp", "step-grpo", "accuracy", "lower", "78.4, 82.1 %"),
    Claim(
        _STEP, "GRPO-lambda is less accurate than it",
        "grpo-lambda", "step-grpo", "accuracy", "lower", "79.9, 82.1 %",
    ),
    Claim(_STEP, "DEER+SFT is less accurate than it", "deer-sft", "step-grpo", "accuracy", "lower", "72.6, 82.1 %"),
    Claim(_STEP, "DEER+SFT is longer than it", "deer-sft", "step-grpo", "tokens", "higher", "CR 0.79, 0.68"),
    Claim(
        _STEP, "without the step reward it is longer",
        "no-step-reward", "step-grpo", "tokens", "higher", "7,941, 6,901 tokens",
    ),
    Claim(
        _STEP, "without truncated rollouts it is less accurate",
        "no-truncation", "step-grpo", "accuracy", "lower", "74.1, 82.1 %",
    ),
    Claim(_STEP, "the mean over all completions is less accurate", "mean-of-all", "step-grpo", "accuracy", "lower"),
    Claim(_STEP, "a threshold of 0.8 is shorter than 0.95", "threshold-0.8", "step-grpo", "tokens", "lower"),
    Claim(_STEP, "a threshold of 0.8 is less accurate than 0.95", "threshold-0.8", "step-grpo", "accuracy", "lower"),
    Claim(_STEP, "a threshold of 0.99 is longer than 0.95", "threshold-0.99", "step-grpo", "tokens", "higher"),
    Claim(
        _STEP, "fewer of its steps are redundant", "step-grpo", "vanilla", "redundancy", "lower", "10.9 %, the least",
    ),
    Claim(
        _SAS, "GRPO in a short context shortens",
        "grpo-short-closed", "vanilla", "tokens", "lower", "3,775, 5,118 tokens",
    ),
    Claim(
        _SAS, "SAS is more accurate than GRPO in a short context",
        "sas", "grpo-short-closed", "accuracy", "higher", "54.5, 53.6 %",
    ),
    Claim(
        _SAS, "SAS is shorter than GRPO in a short context",
        "sas", "grpo-short-closed", "tokens", "lower", "3,407, 3,775 tokens",
    ),
    Claim(_SAS, "L1-Max is shorter than SAS", "l1-max", "sas", "tokens", "lower", "2,071, 3,407 tokens"),
    Claim(_SAS, "L1-Max is less accurate than SAS", "l1-max", "sas", "accuracy", "lower", "52.0, 54.5 %"),
    Claim(_SAS, "LAPO-I is less accurate than SAS", "lapo-i", "sas", "accuracy", "lower", "53.7, 54.5 %"),
    Claim(_SAS, "LAPO-I is longer than SAS", "lapo-i", "sas", "tokens", "higher", "4,001, 3,407 tokens"),
    Claim(_SAS, "ThinkPrune is less accurate than SAS", "thinkprune", "sas", "accuracy", "lower", "53.7, 54.5 %"),
    Claim(_SAS, "ThinkPrune is longer than SAS", "thinkprune", "sas", "tokens", "higher", "3,878, 3,407 tokens"),
    Claim(
        _SAS, "it keeps the accuracy on what it was not trained on",
        "sas", "vanilla", "accuracy", "kept", "38.3, 37.4 %", "unseen",
    ),
    Claim(
        _SAS, "selecting in correct completions only is less accurate",
        "sas-correct", "sas", "accuracy", "lower", "53.9, 54.5 %",
    ),
    Claim(_SAS, "random steps are longer than unsure ones", "sas-random", "sas", "tokens", "higher", "AES 0.38, 0.46"),
    Claim(_SAS, "tokens instead of steps are longer", "sas-token", "sas", "tokens", "higher", "AES 0.39, 0.46"),
    Claim(_SAS, "a ratio of 0.1 is less accurate than 0.3", "ratio-0.1", "sas", "accuracy", "lower", "53.5, 54.5 %"),
    Claim(_SAS, "a ratio of 0.9 is less accurate than 0.3", "ratio-0.9", "sas", "accuracy", "lower", "53.1, 54.5 %"),
    Claim(
        _SAS, "trained for long, GRPO in a short context loses accuracy",
        "grpo-short-long", "grpo-short-closed", "accuracy", "lower",
    ),
    Claim(_SAS, "trained for long, SAS keeps its accuracy", "sas-long", "sas", "accuracy", "kept"),
    Claim(_SHORT_TREE, "it is at least as accurate as SAS", "spo-tree-128", "sas", "accuracy", "kept"),
    Claim(_SHORT_TREE, "it uses fewer tokens than SAS", "spo-tree-128", "sas", "tokens", "lower"),
    Claim(_SHORT_TREE, "it is more accurate than Step-GRPO", "spo-tree-128", "step-grpo", "accuracy", "higher"),
    Claim(_SHORT_TREE, "it uses fewer tokens than Step-GRPO", "spo-tree-128", "step-grpo", "tokens", "lower"),
    Claim(
        _SHORT_TREE, "it is more accurate than Step-GRPO as it was released",
        "spo-tree-128", "step-grpo-released", "accuracy", "higher",
    ),
    Claim(
        _SHORT_TREE, "it uses fewer tokens than Step-GRPO as it was released",
        "spo-tree-128", "step-grpo-released", "tokens", "lower",
    ),
    Claim(
        "SEED-GRPO", "with alpha 0.02 it is more accurate than Dr.GRPO",
        "seed-0.02", "dr-grpo", "accuracy", "higher", "56.6, 51.4 %",
    ),
    Claim("SEED-GRPO", "with alpha 1 it is more accurate than Dr.GRPO", "seed-1", "dr-grpo", "accuracy", "higher"),
    Claim(
        "NFT", "with two updates per rollout it is more accurate than Dr.GRPO",
        "nft-2x", "dr-grpo-2x", "accuracy", "higher", "51.7, 49.8 %",
    ),
    Claim(
        "SPO", "chains are more accurate than GRPO", "spo-chain", "grpo-short", "accuracy", "higher", "56.7, 44.6 %",
    ),
    Claim(
        "SPO", "without the probability mask, chains are less accurate",
        "spo-chain-all-tokens", "spo-chain", "accuracy", "lower", "55.0, 56.7 %",
    ),
    Claim(
        "SPO", "trees are more accurate than GRPO in a short context",
        "spo-tree", "grpo-short", "accuracy", "higher", "73.6, 62.0 %",
    ),
    Claim(
        "Critique-GRPO", "it is more accurate than Dr.GRPO",
        "critique-grpo", "dr-grpo", "accuracy", "higher", "47.1, 42.7 %",
    ),
    Claim(
        "GVM", "it is more accurate than GRPO after as many updates",
        "gvm-grpo", "grpo-short", "accuracy", "higher", "40.4, 38.1 %",
    ),
    Claim(
        "GVM", "half as many updates, which with the E-steps' completions is as much sampling, keep GRPO's accuracy",
        "gvm-grpo-half", "grpo-short", "accuracy", "kept", "2 times fewer updates, without the E-steps",
    ),
    Claim("LEAD", "it uses fewer tokens than GRPO in a short context", "lead", "grpo-short", "tokens", "lower"),
    Claim(
        "DLER", "truncation alone shortens",
        "dler", "vanilla", "tokens", "lower", "about 70 % fewer",
    ),
    Claim("DLER", "truncation alone keeps the accuracy", "dler", "vanilla", "accuracy", "kept"),
    Claim(
        "SPAE", "credit by potential shortens",
        "spae", "vanilla", "tokens", "lower", "6,825, 8,971 tokens",
    ),
    Claim(
        "SPAE", "credit by potential makes it more accurate than the vanilla model",
        "spae", "vanilla", "accuracy", "higher", "63.9, 58.9 %",
    ),
    Claim("TON", "it uses fewer tokens than GRPO", "ton", "grpo", "tokens", "lower", "342, 978 tokens"),
    Claim("TON", "it is more accurate than GRPO", "ton", "grpo", "accuracy", "higher", "82.3, 81.4 %"),
    Claim("TON", "GRPO after the cold start is more accurate than it alone", "ton", "ton-sft", "accuracy", "higher"),
    Claim(
        "VerIPO", "DPO makes fewer thoughts inconsistent",
        "veripo-dpo", "veripo-grpo-1", "inconsistent", "lower", "15.6 to 13.4 % on Video-MMMU",
    ),
    Claim("VerIPO", "DPO keeps the accuracy", "veripo-dpo", "veripo-grpo-1", "accuracy", "kept"),
    Claim("VerIPO", "DPO shortens", "veripo-dpo", "veripo-grpo-1", "tokens", "lower"),
    Claim(
        "VerIPO", "GRPO after DPO is more accurate than before",
        "veripo-grpo-2", "veripo-grpo-1", "accuracy", "higher",
    ),
)  # fmt: skip

CHOICES = (  # what the papers leave open, or their releases change: text, arm with the other choice, and our arm
    ("`keep_trigger=False`", "trigger-dropped", "step-grpo"),
    ("`train_on_injected_tokens=False`", "injected-not-trained", "step-grpo"),
    ("Step-GRPO as it was released", "step-grpo-released", "step-grpo"),
    ("`failed_step_advantage=1.0`, by the earlier version of the paper", "sas-failed-1", "sas"),
    ("SAS as it was released", "sas-released-slip", "sas"),
)


def claim_lines(results: Results) -> list[str]:
    """Return one Markdown line per claim whose arms are finished, and one that names the other claims."""
    lines, missing = [], []
    for claim in CLAIMS:
        about = (claim.measure, claim.benchmark)
        arms = (claim.left, claim.right)
        seeds = [results.trainings(name, *about) if name in results.samples else 0 for name in arms]
        if 0 in seeds:
            missing.append(claim.text)
            continue
        found = results.difference(claim.left, claim.right, *about)
        compared = " against ".join(results.marked(name, f"`{name}`") for name in arms)
        compared += f" on `{claim.benchmark}`" if claim.benchmark else ""
        paper = f" The paper: {claim.paper}." if claim.paper else ""
        lines.append(
            f"- {claim.source}: {claim.text}. **{verdict(found, claim.direction)}**: {compared} "
            f"(seeds: {seeds[0]} and {seeds[1]}), {_numbers(found, claim.measure)}.{paper}"
        )
    if missing:
        lines.append(f"- Not run yet: {'; '.join(missing)}.")
    return lines


def choice_lines(results: Results) -> list[str]:
    """Return one Markdown line per finished choice of [`CHOICES`], which compares the alternative with the default."""
    lines = []
    for text, left, right in CHOICES:
        if left in results.samples and right in results.samples:
            numbers = [_numbers(results.difference(left, right, name), name) for name in ("accuracy", "tokens")]
            seeds = f"{len(results.seeds[left])} and {len(results.seeds[right])}"
            compared = " against ".join(results.marked(name, f"`{name}`") for name in (left, right))
            lines.append(f"- {text}: {compared} (seeds: {seeds}), {', '.join(numbers)}.")
    return lines


def order_table(results: Results, method: str, others: Sequence[str]) -> str:
    """Compare other arms of a table with its method, and say what their intervals mean, as a Markdown table."""
    rows = {}
    for name in others:
        accuracy, tokens = (results.difference(name, method, measure) for measure in ("accuracy", "tokens"))
        sides = ((accuracy, "more accurate", "less accurate"), (tokens, "longer", "shorter"))
        said = [above if found.low > 0 else below for found, above, below in sides if found.is_told]
        rows[results.marked(name)] = {
            "accuracy, points": interval(accuracy, 100),
            "tokens": interval(tokens, 1),
            "by the intervals": ", ".join(said),
        }
    return to_markdown(pd.DataFrame.from_dict(rows, orient="index").rename_axis(f"against `{method}`"))


def _numbers(found: Difference, measure: str) -> str:
    scale, unit = (1, measure) if measure in ("tokens", "steps") else (100, "points")
    return interval(found, scale, f" {unit}")


def interval(found: Difference, scale: int, unit: str = "") -> str:
    """Return a difference and its interval, in multiples of 1 / `scale`."""
    return f"{scale * found.value:+.1f}{unit} ({scale * found.low:+.1f} to {scale * found.high:+.1f})"
