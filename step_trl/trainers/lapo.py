"""
LAPO: length-adaptive policy optimisation, in two stages (arXiv 2507.15758).

Departures from GRPO:
1. The trainer remembers how many tokens the correct completions of each problem take (eq. 3 and 8).
2. Discovery: lengths between two percentiles of the correct ones of the group are rewarded.
3. Internalization: the thought's opening states the remembered length, and completions near it are rewarded.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, cast

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import get_config_model_id

from ..data import problem_text
from ..files import atomic_write
from ..text import THINK_START
from .base import EfficientReasoningTrainer
from .lapo_config import LENGTHS_FILE, LAPOConfig


class SolutionLengths(TrainerCallback):
    """
    Tokens that a solution of each problem takes: the mapping M of the paper, eq. 3 and 8.

    Saved as `lapo_lengths.json` with each checkpoint and at the end of a training, and read where one resumes. A
    problem that was not solved has `unsolved` tokens, the longest completion. With `refine`, as in the second stage, a
    median only replaces a longer one (eq. 8), and a problem that is not solved this time keeps its own. Otherwise the
    last median holds (eq. 3). A `file` has lengths to begin with.
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
        """Take in the completions of an update: of each, its problem, its tokens, and whether it is correct."""
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
        path = Path(checkpoint) / LENGTHS_FILE
        if path.exists():
            self._tokens = json.loads(path.read_text())

    def on_save(self, args, state, control, **kwargs):
        self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args, state, control, **kwargs):
        self._save(Path(args.output_dir), state)

    def _save(self, folder: Path, state) -> None:
        if state.is_world_process_zero:
            with atomic_write(folder / LENGTHS_FILE) as partial:
                partial.write_text(json.dumps(self._tokens))


class LAPOTrainer(EfficientReasoningTrainer):
    """
    Trainer for LAPO.

    LAPO (arXiv 2507.15758) first finds out how long the solutions of each problem are, and then has the model state
    that length before it thinks. Changes with respect to [`~trl.GRPOTrainer`]: one more reward column, and in the
    second stage the end of training prompts.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` a [`LAPOConfig`]. In the second stage, `model` is
    the model of the first one.
    """

    _tag_names = ["trl", "lapo"]
    _name = "LAPO"
    _paper = {
        "title": "LAPO: Internalizing Reasoning Efficiency via Length-Adaptive Policy Optimization",
        "id": "2507.15758",
        "citation": textwrap.dedent("""\
            @article{wu2025lapo,
                title        = {{LAPO: Internalizing Reasoning Efficiency via Length-Adaptive Policy Optimization}},
                author       = {Wu, Xingyu and Yan, Yuchen and Lyu, Shangke and Wu, Linjuan and Qiu, Yiwen and
                                Shen, Yongliang and Lu, Weiming and Shao, Jian and Xiao, Jun and Zhuang, Yueting},
                year         = 2025,
                eprint       = {arXiv:2507.15758},
            }
            """),
    }
    config_class = LAPOConfig
    model_files = (LENGTHS_FILE,)
    args: LAPOConfig

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        refine = self.args.lapo_stage == "internalization"
        folder = model if isinstance(model, str) else get_config_model_id(model.config)
        file = self.args.lengths_file(folder) if refine else None
        self._solution_lengths = SolutionLengths(cast("int", self.max_completion_length), refine, file)
        self.add_callback(self._solution_lengths)

    def reward_columns(self, batch):
        columns = super().reward_columns(batch)
        if batch.training:
            lengths = batch.gather([len(ids) for ids in batch.completion_ids])
            keys = gather_object([SolutionLengths.key(row["prompt"]) for row in batch.rows])
            self._solution_lengths.record(keys, lengths.tolist(), batch.correct.tolist())
        return columns

    def _length_targets(self, batch):
        return [self._solution_lengths.of(SolutionLengths.key(row["prompt"])) for row in batch.rows]

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        memory = self._solution_lengths
        if memory.refine and self.model.training:
            prompt_ids = [
                state_length(ids, memory.of(memory.key(prompt)), self._tokenizer)
                for ids, prompt in zip(prompt_ids, prompts, strict=True)
            ]
        return prompt_ids, images, multimodal_fields

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._solution_lengths.load(checkpoint)


def state_length(prompt_ids: list[int], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Add "I will answer the question with 512 tokens." to a prompt, after a `<think>` that the prompt may already have.
    """
    opened = str(tokenizer.decode(prompt_ids[-8:])).rstrip().endswith(THINK_START)
    stated = f"I will answer the question with {tokens} tokens."
    return prompt_ids + tokenizer.encode(stated if opened else f"{THINK_START} {stated}", add_special_tokens=False)
