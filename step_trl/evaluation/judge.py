"""Classification of the steps of completions by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..rollout.event_loop import gather, run_to_end
from ..text import TRIGGERS, split_steps
from .chat import ChatClient
from .composition import UNKNOWN
from .judge_cache import AnswerCache, read_labels
from .store import KEY


if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

PROMPT = """\
You are given a problem and the solution that a reasoning model wrote for it, cut into numbered steps. Say for each \
step what it is for:

- "forward": it moves towards an answer: it sets the problem up, derives something new, tries a new approach after a \
failure, or states the answer for the first time.
- "verification": it checks a result found before, and the check is worth making: the result was not checked yet, or \
the check finds or corrects an error.
- "redundancy": it adds nothing: it repeats reasoning, checks again what was already found and confirmed, or goes on \
after a confirmed answer without changing it.

Judge a step by what the steps before it had established. Where a step does several things, choose the label of its \
largest part.

<problem>
{problem}
</problem>

<steps>
{steps}
</steps>

Answer with one JSON object and nothing else. Its keys are the numbers of all steps, its values their labels, as in \
{"1": "forward", "2": "verification"}."""
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Estimate:
    """
    Estimated effort of labelling, at four characters per token. A judge that thinks before it answers needs more.

    Attributes:
        calls (`int`), cached (`int`):
            Number of distinct completions to label, and of completions with cached answers.
        prompt_tokens (`int`), completion_tokens (`int`):
            Tokens of the calls, if each is answered at the first attempt.
        cost (`float`, *optional*):
            Cost of these tokens, in the currency of the price.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None


class StepJudge:
    """
    Labels the semantic steps of completions `"forward"`, `"verification"` or `"redundancy"` by asking a model.

    Each completion is one call, and its answer is stored on disk at once, so that an interrupted run continues where
    it stopped. After `max_attempts` unusable answers a completion is labelled `"unknown"`, which is stored, too. Other
    `options` need new answers.

    Needs the extra `judge`: `pip install -e '.[judge]'`.

    Args:
        base_url (`str`), model (`str`):
            URL of an OpenAI-compatible server, `http://host:8000`, or with the path before `/chat/completions` if that
            is not `/v1`, and the name of the model on the server.
        api_key (`str`, *optional*):
            Bearer token. It is never displayed or stored.
        cache (`str` or `Path`):
            Folder for the answers, which is created if necessary. Several judges may share it.
        max_concurrent (`int`, *optional*, defaults to `16`), max_attempts (`int`, *optional*, defaults to `3`):
            Maximum number of concurrent calls, and of answers per completion.
        timeout (`float`, *optional*, defaults to `600.0`), retry_window (`float`, *optional*, defaults to `60.0`):
            Maximum number of seconds for one answer, and from the first failure of a call until it is given up.
        prompt (`str`, *optional*):
            Prompt with the placeholders `{problem}` and `{steps}`. It must ask for a JSON object of number to label.
        triggers (`Sequence[str]`, *optional*):
            Words that open a semantic step.
        options (`Mapping[str, Any]`, *optional*):
            Further fields of the request body, such as `max_tokens`. `temperature` is 0 by default, `None` leaves it
            to the server.

    Attributes:
        malformed (`int`), unknown (`int`):
            Number of unusable answers so far, and of completions that the last [`StepJudge.label`] labelled
            `"unknown"`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        cache: str | Path,
        max_concurrent: int = 16,
        max_attempts: int = 3,
        timeout: float = 600.0,
        retry_window: float = 60.0,
        prompt: str = PROMPT,
        triggers: Sequence[str] = TRIGGERS,
        options: Mapping[str, Any] | None = None,
    ):
        for name in ("{problem}", "{steps}"):
            if name not in prompt:
                raise ValueError(f"prompt: {name} is missing. Put it where the text belongs.")
        for name, value in (("max_concurrent", max_concurrent), ("max_attempts", max_attempts)):
            if value < 1:
                raise ValueError(f"{name}: {value} is less than one. Leave it out for the default.")
        self.chat = ChatClient(
            base_url, model, api_key, {"temperature": 0.0} | dict(options or {}), timeout, retry_window
        )
        self.model, self.prompt, self.triggers = model, prompt, tuple(triggers)
        self.max_concurrent, self.max_attempts = max_concurrent, max_attempts
        self.malformed = self.unknown = 0
        self._cache = AnswerCache(cache)

    def estimate(self, samples: pd.DataFrame, price_per_million: tuple[float, float] | None = None) -> Estimate:
        """
        Estimate the effort of [`StepJudge.label`]. Nothing is sent.

        Args:
            samples ([`~pandas.DataFrame`]):
                Samples to label.
            price_per_million (`tuple[float, float]`, *optional*):
                Price of a million prompt tokens and of a million completion tokens.
        """
        jobs = {job.key: job for job in self._jobs(samples)}
        asked = [job for key, job in jobs.items() if key not in self._cache]
        answers = [json.dumps({str(number): "verification" for number in range(1, job.steps + 1)}) for job in asked]
        prompt_tokens = sum(ceil(len(job.content) / _CHARACTERS_PER_TOKEN) for job in asked)
        completion_tokens = sum(ceil(len(answer) / _CHARACTERS_PER_TOKEN) for answer in answers)
        cost = None
        if price_per_million is not None:
            cost = (prompt_tokens * price_per_million[0] + completion_tokens * price_per_million[1]) / 1e6
        return Estimate(len(asked), len(jobs) - len(asked), prompt_tokens, completion_tokens, cost)

    def label(self, samples: pd.DataFrame) -> pd.DataFrame:
        """
        Label every step of every sample.

        Args:
            samples ([`~pandas.DataFrame`]):
                Rows of [`evaluate`] (`benchmark`, `problem`, `sample`, `completion`, optionally `model`) with a
                further column `question`, the text of the problem.

        Returns:
            [`~pandas.DataFrame`]: one row per step: `benchmark`, `problem`, `sample`, `step` (from 1), `label`.

        Raises:
            `ChatError`: the server refused a call or did not answer. Earlier answers remain on disk.
        """
        jobs = self._jobs(samples)
        run_to_end(self._ask_all({job.key: job for job in jobs if job.key not in self._cache}.values()))
        found = [self._cache[job.key] for job in jobs]
        self.unknown = sum(labels is None for labels in found)
        if self.unknown:
            logger.warning(
                "%d of %d completions are labelled %r: %s gave no usable labels for them in %d attempts",
                self.unknown, len(jobs), UNKNOWN, self.model, self.max_attempts,
            )  # fmt: skip
        rows = samples[[*(["model"] if "model" in samples else []), *KEY]].reset_index(drop=True)
        rows["label"] = [labels or [UNKNOWN] * job.steps for job, labels in zip(jobs, found, strict=True)]
        rows["step"] = [list(range(1, job.steps + 1)) for job in jobs]
        rows = rows.explode(["step", "label"], ignore_index=True)
        return rows[[*rows.columns.drop(["step", "label"]), "step", "label"]].astype({"step": int, "label": str})

    def _jobs(self, samples: pd.DataFrame) -> list[_Job]:
        missing = [column for column in (*KEY, "completion", "question") if column not in samples]
        if missing:
            raise ValueError(
                f"samples: there is no column {' and '.join(missing)}. Pass rows of `evaluate` with a column "
                "`question`, the text of each problem."
            )
        return [self._job(question, text) for question, text in zip(samples["question"], samples["completion"])]

    def _job(self, question: str, completion: str) -> _Job:
        steps = split_steps(completion, self.triggers)
        numbered = "\n\n".join(f"[{number}] {step.strip() or '(empty)'}" for number, step in enumerate(steps, 1))
        texts = {"problem": question, "steps": numbered}
        # In one pass, because a problem may contain "{steps}".
        content = re.sub(r"\{(problem|steps)\}", lambda match: texts[match[1]], self.prompt)
        key = hashlib.sha256(json.dumps([self.model, self.prompt, content, self.chat.options]).encode()).hexdigest()
        return _Job(key, content, len(steps))

    async def _ask_all(self, jobs: Iterable[_Job]) -> None:
        places = asyncio.Semaphore(self.max_concurrent)

        async def ask(job: _Job) -> None:
            async with places:
                self._cache.add(job.key, await self._ask(client, job))

        async with self.chat.session() as client:
            await gather(map(ask, jobs))

    async def _ask(self, client: AsyncOpenAI, job: _Job) -> list[str] | None:
        content = job.content
        for _ in range(self.max_attempts):
            answer = await self.chat.ask(client, content)
            try:
                return read_labels(answer, job.steps)
            except ValueError as error:
                self.malformed += 1
                # Change the prompt, because a greedy judge would repeat its answer.
                content = f"{job.content}\n\nAn earlier answer of yours could not be used. {error}"
        return None


@dataclass(frozen=True)
class _Job:
    """A completion to label: key in the cache, content of the message, number of steps."""

    key: str
    content: str
    steps: int
