"""The completions of one request, each a truncated rollout whose text is read while it is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..rollout import DynamicTruncatedRollout, SamplingParams
from ..rollout.event_loop import gather
from .exits import exit_report
from .prompts import Prompt
from .requests import Sampling
from .text import CompletionText, Delta


@dataclass
class Choice:
    """A completion: its text so far, and its record once it has ended."""

    index: int
    prompt: Prompt
    seed: int | None
    text: CompletionText
    reasoning: str = ""
    content: str = ""
    early_exit: dict[str, Any] | None = None
    ended: bool = False

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        return "stop" if self.text.stopped or self.ended else "length"

    def add(self, delta: Delta) -> None:
        """Append text."""
        self.reasoning += delta.reasoning
        self.content += delta.content


# Called with further text of a completion, and whether it is the last, with which the completion has its report.
OnText = Callable[[Choice, Delta, bool], None]


class Completions:
    """
    All completions of one request.

    Args:
        rollout ([`DynamicTruncatedRollout`]):
            Samples on the served model.
        prompts (`Sequence[Prompt]`), sampling ([`Sampling`]):
            What the request asks for.
        pieces (`Sequence[bytes]`), separate (`bool`):
            Of [`CompletionText`]: the tokens, and whether thoughts are taken apart.
    """

    def __init__(
        self,
        rollout: DynamicTruncatedRollout,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        pieces: Sequence[bytes],
        separate: bool,
    ):
        self.prompts = prompts
        self.sampling = sampling
        self._rollout = rollout
        self._callbacks = sampling.exits.callbacks(rollout.engine.tokenizer)
        self.choices: list[Choice] = []
        for prompt in prompts:
            for number in range(sampling.n):
                text = CompletionText(pieces, sampling.stop, prompt.thought if separate else None)
                seed = None if sampling.seed is None else sampling.seed + number  # as in vLLM
                self.choices.append(Choice(len(self.choices), prompt, seed, text))

    async def run(self, on_text: OnText | None = None) -> None:
        """Sample all completions, and pass on their text if somebody reads it. Cancelling stops everything."""
        await gather(self._sample(choice, on_text) for choice in self.choices)

    async def _sample(self, choice: Choice, on_text: OnText | None) -> None:
        def read(token_ids: list[int]) -> bool:
            delta = choice.text.add(token_ids)
            choice.add(delta)
            if on_text is not None and any(delta):
                on_text(choice, delta, False)
            return choice.text.stopped

        sampling, prompt = self.sampling, choice.prompt
        params = SamplingParams(
            prompt.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p
        )
        rollout = self._rollout.with_options([] if prompt.thought == "closed" else self._callbacks, params)
        # A completion that nobody reads before its end is looked at in one piece, which takes less time.
        is_read = on_text is not None or bool(sampling.stop)
        record = await rollout.sample(prompt.token_ids, choice.seed, on_tokens=read if is_read else None)
        if not is_read:
            read(record.completion_ids)
        rest = choice.text.end()
        choice.add(rest)
        choice.ended = record.ended
        choice.early_exit = exit_report(record, sampling.exits, prompt.max_tokens)
        if on_text is not None:
            on_text(choice, rest, True)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's token counts, and the sums of the reports of early exits."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.text.tokens for choice in self.choices)
        reports = [choice.early_exit for choice in self.choices if choice.early_exit is not None]
        summed = ("exited", "probes", "probe_tokens", "discarded_tokens", "saved_tokens_at_most")
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.text.reasoning_tokens for choice in self.choices)
            },
            "early_exit": {name: sum(int(report[name]) for report in reports) for name in summed},
        }
