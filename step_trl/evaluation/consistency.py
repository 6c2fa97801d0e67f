"""A judge of whether a thought leads to its answer, behind an OpenAI-compatible endpoint (VerIPO)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..rollout.event_loop import run_to_end
from ..text import THINK_END
from .chat import ChatClient


PROMPT = """\
A model thought about a question, and then gave an answer. You see its thought and its answer, but not the question. \
Say whether the thought leads to this answer. It does not matter whether the answer is right.

<thought>
{thought}
</thought>

<answer>
{answer}
</answer>

Reply with one word: yes, if the thought concludes this answer, or no, if it concludes something else."""


class ConsistencyJudge:
    """
    Asks a language model whether a thought leads to an answer. The words of the question are ours.

    Each call is one question. A reply without "yes" or "no" is asked for again; after `max_attempts` such replies,
    the thought counts as consistent.

    Needs the extra `judge`: `pip install -e '.[judge]'`.

    Args:
        base_url (`str`), model (`str`), api_key (`str`, *optional*):
            As in [`StepJudge`].
        max_attempts (`int`, *optional*, defaults to `3`):
            The maximum number of replies.
        timeout (`float`, *optional*, defaults to `600.0`), retry_window (`float`, *optional*, defaults to `60.0`):
            As in [`StepJudge`].
        options (`Mapping[str, Any]`, *optional*):
            Further fields of the request body, such as `max_tokens`. `temperature` is 0 by default.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        max_attempts: int = 3,
        timeout: float = 600.0,
        retry_window: float = 60.0,
        options: Mapping[str, Any] | None = None,
    ):
        if max_attempts < 1:
            raise ValueError(f"max_attempts: {max_attempts} is less than one. Leave it out for the default.")
        options = {"temperature": 0.0} | dict(options or {})
        self.chat = ChatClient(base_url, model, api_key, options, timeout, retry_window)
        self.max_attempts = max_attempts

    def __call__(self, thought: str, answer: str) -> bool:
        return run_to_end(self._ask(thought, answer))

    async def _ask(self, thought: str, answer: str) -> bool:
        texts = {"thought": thought, "answer": answer}
        content = re.sub(r"\{(thought|answer)\}", lambda match: texts[match[1]], PROMPT)
        async with self.chat.session() as client:
            for _ in range(self.max_attempts):
                verdict = read_yes_or_no(await self.chat.ask(client, content))
                if verdict is not None:
                    return verdict
                # Change the prompt, because a greedy judge would repeat its reply.
                content += "\nReply with yes or no only."
        return True


def read_yes_or_no(reply: str) -> bool | None:
    """Return the last "yes" or "no" of a reply, as a truth value, or `None` if it has neither."""
    words = re.findall(r"\b(yes|no)\b", reply.rpartition(THINK_END)[2], re.IGNORECASE)
    return words[-1].lower() == "yes" if words else None
