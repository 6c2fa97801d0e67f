"""The critics of Critique-GRPO: they tell the policy what is wrong with a completion, and ask it to answer again."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from ..evaluation.chat import ChatClient, ChatError
from ..rewards import extract_answers
from ..rollout import Rollout
from ..rollout.event_loop import gather, run_to_end
from ..rollout.refine import (
    critique_request,
    indicative_critique,
    question_of,
    read_verdict,
    refinement_request,
    with_question,
)
from ..runtime.ranks import rollout_seeds
from .base import EfficientReasoningTrainer
from .batch import Batch
from .critique_grpo_config import CritiqueGRPOConfig


logger = logging.getLogger(__name__)
PAPER = {"temperature": 0.7, "top_p": 0.75, "max_tokens": 4096}
AT_ONCE = 16  # questions to the endpoint


class Critics:
    """
    Writes the prompts of refinements.

    Args:
        args ([`CritiqueGRPOConfig`]):
            The configuration.
        max_length (`int`):
            The number of tokens that a prompt and its completion can have together.
    """

    def __init__(self, args: CritiqueGRPOConfig, max_length: int):
        self.args = args
        longest = ["max_completion_length", *(["max_critique_length"] if args.critique == "self" else [])]
        name = max(longest, key=lambda name: getattr(args, name))
        room = max_length - getattr(args, name)
        if room < 1:
            raise ValueError(
                f"{name}: {getattr(args, name)} tokens leave {room} of {max_length} for the prompt of a refinement, "
                "which is the question and an earlier completion. Set it lower, or use a longer context (of a vLLM "
                "server, --max-model-len)."
            )
        self._prompt_limit = min(args.max_refinement_prompt_length or room, room)
        self._chat: ChatClient | None = None
        if args.critic_url is not None and args.critic_model is not None:
            options = args.critic_options if isinstance(args.critic_options, dict) else {}
            key = os.environ.get("CRITIC_API_KEY")
            self._chat = ChatClient(args.critic_url, args.critic_model, key, PAPER | options, 600.0, 60.0)

    def refinement_prompts(
        self,
        trainer: EfficientReasoningTrainer,
        batch: Batch,
        rollouts: list[Rollout],
        places: list[int],
        right: list[bool],
        seeds: list[int] | None,
    ) -> list[list[int]]:
        """
        Return the token ids of a prompt for each refinement. Every process must call this.

        Args:
            trainer ([`EfficientReasoningTrainer`]):
                The trainer, whose policy writes self-critiques.
            batch ([`Batch`]):
                The generation batch, in `sample`.
            rollouts (`list[Rollout]`), right (`list[bool]`):
                The completions of the batch, and which are correct.
            places (`list[int]`):
                The completions to refine.
            seeds (`list[int]`, *optional*):
                The seeds of the completions of the batch.
        """
        texts = trainer._tokenizer.batch_decode(
            [rollouts[place].completion_ids for place in places], skip_special_tokens=True
        )
        rows = [batch.rows[place] for place in places]
        jobs = [
            _Job(row, text, answer, right[place], None if seeds is None else seeds[place])
            for place, row, text, answer in zip(places, rows, texts, self._answers(rows), strict=True)
        ]
        critiques = self._critiques(trainer, jobs)
        return [
            self._prompt(trainer, job, partial(_refinement_of, critique=critique))
            for job, critique in zip(jobs, critiques, strict=True)
        ]

    def _answers(self, rows: list[dict[str, Any]]) -> list[str]:
        """Return the reference answer of each row: the final one of its solution, or the whole solution."""
        if self.args.critique == "indicative":
            return [""] * len(rows)
        solutions = [row["solution"] for row in rows]
        return [answer or solution for answer, solution in zip(extract_answers(solutions), solutions, strict=True)]

    def _critiques(self, trainer: EfficientReasoningTrainer, jobs: list[_Job]) -> list[str]:
        if self.args.critique == "indicative":
            return [indicative_critique(job.right) for job in jobs]
        critiques = [indicative_critique(job.right, job.answer) for job in jobs]
        if self.args.critique == "self":
            written = self._criticise_oneself(trainer, jobs)
        elif self.args.critique == "cot":  # only failed completions are worth a call
            written = run_to_end(self._ask([None if job.right else job for job in jobs]))
        else:
            return critiques
        agreeing = [
            text is not None and read_verdict(text) == job.right for text, job in zip(written, jobs, strict=True)
        ]
        agreed = torch.tensor(agreeing, device=trainer.accelerator.device)
        trainer.log_masked_means({"critique/agreed": (agreed.float(), torch.ones_like(agreed))})
        return [
            cast("str", text) if agrees else critique
            for text, agrees, critique in zip(written, agreeing, critiques, strict=True)
        ]

    def _criticise_oneself(self, trainer: EfficientReasoningTrainer, jobs: list[_Job]) -> list[str | None]:
        rollouts = trainer.run_rollouts(
            [self._prompt(trainer, job, _critique_of) for job in jobs],
            seeds=[rollout_seeds([job.seed], 1, 1)[0] for job in jobs if job.seed is not None] or None,
            budgets=[self.args.max_critique_length] * len(jobs),
        )
        ids = [rollout.completion_ids for rollout in rollouts]
        return list(trainer._tokenizer.batch_decode(ids, skip_special_tokens=True))

    async def _ask(self, jobs: list[_Job | None]) -> list[str | None]:
        """Ask the endpoint for a critique of each job, which may be `None`. It is `None` if there is no answer."""
        chat, places = cast("ChatClient", self._chat), asyncio.Semaphore(AT_ONCE)
        async with chat.session() as client:

            async def ask(job: _Job | None) -> str | None:
                if job is None:
                    return None
                request = critique_request(question_of(job.row["prompt"]), job.solution, job.row["solution"])
                async with places:
                    try:
                        return await chat.ask(client, request)
                    except ChatError as error:
                        logger.warning("critic_url: no critique, so the verdict and the answer are given. %s", error)
                        return None

            return await gather(map(ask, jobs))

    def _prompt(self, trainer: EfficientReasoningTrainer, job: _Job, request_of: Callable[[_Job], str]) -> list[int]:
        """Tokenize a request as TRL does prompts. The earlier solution loses its beginning if it is too long."""
        limit = self._prompt_limit
        (ids,) = trainer.tokenize_prompts([with_question(job.row["prompt"], request_of(job))])
        if len(ids) > limit:
            solution = trainer._tokenizer.encode(job.solution, add_special_tokens=False)
            kept = len(solution) - (len(ids) - limit) - 1  # one more for the ellipsis
            shorter = f"…{trainer._tokenizer.decode(solution[-kept:])}" if kept > 0 else ""
            request = request_of(replace(job, solution=shorter))
            (ids,) = trainer.tokenize_prompts([with_question(job.row["prompt"], request)])
        return ids


@dataclass(frozen=True)
class _Job:
    """A completion to criticise and refine."""

    row: dict[str, Any]
    solution: str
    answer: str
    right: bool
    seed: int | None


def _refinement_of(job: _Job, critique: str) -> str:
    return refinement_request(question_of(job.row["prompt"]), job.solution, critique)


def _critique_of(job: _Job) -> str:
    return critique_request(question_of(job.row["prompt"]), job.solution)
