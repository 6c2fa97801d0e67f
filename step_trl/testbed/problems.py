"""
Problems of the testbed: chains of additions and subtractions from the `reasoning-gym` generators.

The splits are frozen as JSONL files next to this module. `reasoning-gym` is needed only to generate them again:

    python -m step_trl.testbed.problems
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

DATA_DIR = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Split:
    """The source of the problems of one split: a `reasoning-gym` generator, its options and a seed."""

    generator: str
    size: int
    seed: int
    options: dict


def _split(
    size: int, seed: int, terms: tuple[int, int], digits: tuple[int, int], generator: str = "chain_sum", **options: Any
) -> Split:
    limits = {"min_terms": terms[0], "max_terms": terms[1], "min_digits": digits[0], "max_digits": digits[1]}
    return Split(generator, size, seed, limits | options)


# The model is not trained on this family: other wording, and numbers from 0 to 100 in the same expression.
_UNSEEN = {"operators": ["+", "-"], "allow_parentheses": False, "format_style": "natural"}
SPLITS = {
    "train": _split(4096, 1_000_000, terms=(2, 6), digits=(1, 2)),
    "easy": _split(256, 2_000_000, terms=(4, 6), digits=(1, 1)),
    "medium": _split(256, 3_000_000, terms=(3, 4), digits=(2, 2)),
    "hard": _split(256, 4_000_000, terms=(5, 6), digits=(2, 2)),
    "unseen": _split(256, 5_000_000, terms=(3, 5), digits=(2, 2), generator="basic_arithmetic", **_UNSEEN),
}
EVALUATION_SPLITS = ("easy", "medium", "hard", "unseen")


def parse_expression(expression: str) -> list[int]:
    """`"12 + 47 - 38"` -> `[12, 47, -38]`."""
    return [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", expression)]


def never_negative(terms: list[int]) -> bool:
    """Return whether every running total is at least 0: the testbed's traces contain no negative numbers."""
    return all(total >= 0 for total in accumulate(terms))


def generate(split: Split, exclude: Collection[str] = ()) -> Iterator[dict]:
    """Yield distinct problems (`question`, `solution`, `expression`) endlessly, without the excluded expressions."""
    import reasoning_gym

    seen = set(exclude)
    dataset = reasoning_gym.create_dataset(split.generator, seed=split.seed, size=10**9, **split.options)
    for index in range(10**9):
        entry = dataset[index]
        expression = entry["metadata"]["expression"]
        if expression in seen or not never_negative(parse_expression(expression)):
            continue
        seen.add(expression)
        yield {"question": entry["question"], "solution": entry["answer"], "expression": expression}


def freeze(data_dir: Path = DATA_DIR) -> None:
    """Write every split as JSONL. Evaluation problems are drawn first, so that no training problem repeats one."""
    taken: set[str] = set()
    for name in (*EVALUATION_SPLITS, "train"):
        problems = generate(SPLITS[name], exclude=taken)
        rows = [next(problems) for _ in range(SPLITS[name].size)]
        taken.update(row["expression"] for row in rows)
        (data_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_problems(split: str, data_dir: Path = DATA_DIR) -> list[dict]:
    """Return the rows of a frozen split: `question`, `solution`, `expression`."""
    return [json.loads(line) for line in (data_dir / f"{split}.jsonl").read_text().splitlines()]


def as_dataset(rows: Iterable[dict]) -> Dataset:
    """Return problems as rows with `prompt` (messages) and `solution` (str)."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["question"]}], "solution": r["solution"]} for r in rows]
    )


if __name__ == "__main__":
    freeze()
