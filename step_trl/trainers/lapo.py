"""LAPO's memory of how long the solutions of each problem are (arXiv 2507.15758)."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..data import problem_text
from ..files import atomic_write
from ..text import THINK_END


THINK_START = THINK_END.replace("/", "")
FILE = "lapo_lengths.json"


class SolutionLengths(TrainerCallback):
    """
    Tokens that a solution of each problem takes: the mapping M of the paper, eq. 3 and 8.

    Saved as `lapo_lengths.json` with each checkpoint and at the end of a training, and read where one goes on.

    Args:
        unsolved (`int`):
            Tokens of a problem that was not solved, the longest completion.
        refine (`bool`):
            As in the second stage: a median only replaces a longer one (eq. 8), and a problem that is not solved this
            time keeps its own. Otherwise the last median holds (eq. 3).
        file (`str` or `Path`, *optional*):
            Lengths to begin with.
    """

    def __init__(self, unsolved: int, refine: bool, file: str | Path | None = None):
        self.unsolved = unsolved
        self.refine = refine
        self._tokens: dict[str, int] = {} if file is None else json.loads(Path(file).read_text())

    @staticmethod
    def key(prompt: Any) -> str:
        """What the lengths of a problem are stored under: a digest of its text."""
        return hashlib.sha256(problem_text(prompt).encode()).hexdigest()[:16]

    def of(self, key: str) -> int:
        """Tokens of a problem."""
        return self._tokens.get(key, self.unsolved)

    def record(self, keys: Iterable[str], lengths: Iterable[int], correct: Iterable[bool]) -> None:
        """
        Take in the completions of an update.

        Args:
            keys (`Iterable[str]`):
                Problem of each completion.
            lengths (`Iterable[int]`), correct (`Iterable[bool]`):
                Its tokens, and whether its answer is right.
        """
        solutions: defaultdict[str, list[int]] = defaultdict(list)
        for key, length, right in zip(keys, lengths, correct, strict=True):
            solutions[key] += [length] if right else []
        for key, tokens in solutions.items():
            if tokens:
                found = round(median(tokens))
                self._tokens[key] = min(found, self.of(key)) if self.refine else found
            elif not self.refine:
                self._tokens.pop(key, None)

    def load(self, checkpoint: str | Path) -> None:
        """Go on with the lengths of a checkpoint, if it has any."""
        path = Path(checkpoint) / FILE
        if path.exists():
            self._tokens = json.loads(path.read_text())

    def on_save(self, args, state, control, **kwargs):
        self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args, state, control, **kwargs):
        self._save(Path(args.output_dir), state)

    def _save(self, folder: Path, state) -> None:
        if state.is_world_process_zero:
            with atomic_write(folder / FILE) as partial:
                partial.write_text(json.dumps(self._tokens))


def state_length(prompt_ids: list[int], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    A prompt with the number of tokens stated in the opening of its thought.

    Args:
        prompt_ids (`list[int]`):
            Of the prompt, which may or may not open the thought.
        tokens (`int`):
            To be stated.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the ids.

    Returns:
        `list[int]`: with "I will answer the question with 512 tokens." behind the `<think>`.
    """
    opened = str(tokenizer.decode(prompt_ids[-8:])).rstrip().endswith(THINK_START)
    stated = f"I will answer the question with {tokens} tokens."
    return prompt_ids + tokenizer.encode(stated if opened else f"{THINK_START} {stated}", add_special_tokens=False)
