"""Rollouts that a training has recorded, see `record_rollouts` of [`~step_trl.EfficientReasoningConfig`]."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..files import atomic_write
from ..rewards import extract_answers
from ..text import completion_text
from ..thoughts import answer_block, split_thought


ROLLOUTS = "rollouts"  # folder in the output_dir of a training
QUESTION = ["prompt", "images"]  # the columns that identify a question, see `row_key`


class RolloutRecorder:
    """
    Writes the rollouts of a training to `rollouts/` in its `output_dir`, one Parquet file per generation.

    Args:
        output_dir (`str` or `Path`):
            The folder of the training.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer, which counts the tokens of thoughts.
    """

    def __init__(self, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase):
        self.folder = Path(output_dir) / ROLLOUTS
        self.tokenizer = tokenizer
        self._update = self._number = 0

    def describe(
        self,
        rows: Sequence[dict[str, Any]],
        completions: Sequence[str] | Sequence[list[dict]],
        **columns: Sequence[Any],
    ) -> list[dict[str, Any]]:
        """
        Return what is recorded of each of this process's completions.

        Args:
            rows (`Sequence[dict[str, Any]]`):
                The row of the data set that each completion belongs to.
            completions (`Sequence[str]` or `Sequence[list[dict]]`):
                The completions, as text or messages.
            **columns (`Sequence[Any]`):
                Further columns as they are, one value per completion.
        """
        texts = [completion_text(completion) for completion in completions]
        parts = [split_thought(text) for text in texts]
        thoughts = [thought for thought, _ in parts]
        blocks = [answer_block(text) for text in texts]
        missing = [place for place, block in enumerate(blocks) if block is None]
        read = dict(zip(missing, extract_answers([texts[i] for i in missing], require_end_of_thinking=True)))
        counts = [len(ids) for ids in self.tokenizer(thoughts, add_special_tokens=False)["input_ids"]]
        solutions = [row.get("solution") for row in rows]
        described = columns | {
            "prompt": [prompt_key(row["prompt"]) for row in rows],
            "images": [images_key(row) for row in rows],
            "solution": [None if solution is None else str(solution) for solution in solutions],
            "completion": texts,
            "thought": thoughts,
            "answer": [read.get(place, block) for place, block in enumerate(blocks)],
            "thought_tokens": counts,
        }
        return [dict(zip(described, values)) for values in zip(*described.values(), strict=True)]

    def write(self, update: int, rollouts: Sequence[dict[str, Any]]) -> None:
        """
        Write the rollouts of all processes, from one process.

        `update` is the number of the update that they are for. A training that is resumed writes the same files again.
        """
        self._number = self._number + 1 if update == self._update else 0  # an update may have several generations
        self._update = update
        name = f"{update:06d}-{self._number:03d}"
        with atomic_write(self.folder / f"{name}.parquet") as partial:
            pd.DataFrame(list(rollouts)).assign(update=update, generation=name).to_parquet(partial, index=False)


def prompt_key(prompt: str | list[dict]) -> str:
    """Return a prompt as text that identifies it. Messages are JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def images_key(row: Mapping[str, Any]) -> str:
    """Return a fingerprint of the images of a row, empty if it has none."""
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    digests = [
        hashlib.blake2b(f"{one.mode} {one.size}".encode() + one.tobytes(), digest_size=8).hexdigest() for one in images
    ]
    return " ".join(digests)


def row_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what identifies the question of a row of a data set: its prompt and its images."""
    return prompt_key(row["prompt"]), images_key(row)


def prompt_of(key: str) -> str | list[dict]:
    """Return the prompt of a [`prompt_key`]."""
    try:
        found = json.loads(key)
    except ValueError:
        return key
    # A text may be JSON, too, such as a number.
    return found if isinstance(found, list) and is_conversational({"prompt": found}) else key


def read_rollouts(folder: str | Path) -> pd.DataFrame:
    """
    Read the rollouts that a training has recorded.

    Args:
        folder (`str` or `Path`):
            The `output_dir` of a training with `record_rollouts=True`.

    Returns:
        [`~pandas.DataFrame`]: One row per completion: `update` (its number, from 1), `group`, `prompt` (text, or
        messages as JSON), `images` (a fingerprint, empty without images), `completion`, `thought`, `answer` and
        `solution` (`None` where there is none), `reward`, `correct`, `truncated` (it has no end), `prompt_tokens`,
        `tokens` and `thought_tokens`.
    """
    files = sorted((Path(folder) / ROLLOUTS).glob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"rollouts: {folder} records no rollouts. Give the output_dir of a training with record_rollouts=true."
        )
    found = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    # Groups are numbered within a generation, which is a file.
    found["group"] = found.groupby(["generation", "group"], sort=False).ngroup()
    return found.drop(columns="generation")


def latest_groups(rollouts: pd.DataFrame) -> pd.DataFrame:
    """Return the rollouts of each prompt's last group, those closest to the trained policy."""
    last = rollouts.groupby(QUESTION, sort=False)["group"].transform("max")
    return rollouts[rollouts["group"] == last].reset_index(drop=True)


def thin_easy_prompts(dataset: Dataset, rollouts: pd.DataFrame, keep: float = 0.2, seed: int = 0) -> Dataset:
    """
    Drop most prompts whose last recorded group was all correct (VerIPO keeps 20 % of them).

    Whether a prompt is kept depends on `seed` and its text and images alone. Prompts without rollouts are kept.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`.
        rollouts ([`~pandas.DataFrame`]):
            The result of [`read_rollouts`] on these prompts.
        keep (`float`, *optional*, defaults to `0.2`):
            The probability with which such a prompt is kept.
        seed (`int`, *optional*, defaults to `0`):
            The seed of the draw.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: {keep} is not a probability. Set for example 0.2.")
    solved = latest_groups(rollouts).groupby(QUESTION)["correct"].all()
    easy = set(solved.index[solved])

    def stays(row: dict[str, Any]) -> bool:
        key = row_key(row)
        return key not in easy or random.Random(f"{seed}-{' '.join(key)}").random() < keep

    kept = dataset.filter(stays)
    if not len(kept):
        raise ValueError(
            f"keep: all {len(dataset)} prompts are easy, and none is left. Keep a larger share than {keep}, or take "
            "harder problems."
        )
    return kept
