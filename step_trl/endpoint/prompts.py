"""Prompts as token ids: conversations rendered by the chat template, and texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..steps import token_bytes
from ..text import THINK_END, THINK_START
from .errors import RequestError, shown
from .requests import Sampling


# Whether the prompt has opened the thought, or closed it already, or leaves that to the model.
Thought = Literal["open", "closed", "none"]
_DEFAULT_MAX_TOKENS = 16  # of a text completion, as OpenAI's and vLLM's
_TAIL, _TAIL_CHARACTERS = 16, 1000  # at the end of a prompt, where a tag is looked for


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and how many tokens its completion may have."""

    token_ids: list[int]
    thought: Thought
    max_tokens: int


class PromptReader:
    """
    Turns requests into token ids, and refuses those that do not fit the model.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the served model, with its chat template.
        max_length (`int`):
            Maximum number of tokens of a prompt and its completion together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._longest_token = max(map(len, token_bytes(tokenizer)))
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1

    def chat(self, messages: list[dict[str, str]], options: dict[str, Any], sampling: Sampling) -> Prompt:
        """Render a conversation. Without a limit, its answer may fill the model's context."""
        if self._tokenizer.chat_template is None:
            raise RequestError("messages", "the model has no chat template. Use /v1/completions.")
        try:
            text: Any = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # a template is a program of the model's, and its input is the client's
            raise RequestError("messages", f"the chat template refuses them: {str(error)[:200]}") from None
        return self._fit("messages", self._encode("messages", text, special=False), text, sampling, None)

    def completion(self, prompt: str | list[int], sampling: Sampling) -> Prompt:
        """Encode a text, or check token ids."""
        if isinstance(prompt, str):
            ids = self._encode("prompt", prompt, special=True)
            return self._fit("prompt", ids, prompt, sampling, _DEFAULT_MAX_TOKENS)
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            outside = next(one for one in prompt if not 0 <= one < self._vocab_size)
            raise RequestError("prompt", f"{shown(outside)} is no token id. Send ids below {self._vocab_size}.")
        tail = str(self._tokenizer.decode(prompt[-_TAIL:]))
        return self._fit("prompt", prompt, tail, sampling, _DEFAULT_MAX_TOKENS)

    def _encode(self, field: str, text: str, special: bool) -> list[int]:
        if len(text) > self._max_length * self._longest_token:  # known to be too long without encoding it
            raise RequestError(
                field,
                f"{len(text)} characters do not fit the model's context of {self._max_length} tokens. Send less.",
            )
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _fit(
        self, field: str, token_ids: list[int], text: str, sampling: Sampling, default_max_tokens: int | None
    ) -> Prompt:
        length, room = len(token_ids), self._max_length - len(token_ids)
        if length == 0:
            raise RequestError(field, "is a prompt without tokens. Send some text.")
        if room < 1:
            raise RequestError(
                field,
                f"{length} tokens leave no room for a completion in the model's context of {self._max_length} tokens. "
                "Send less.",
                code="context_length_exceeded",
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise RequestError(
                sampling.max_tokens_field,
                f"{sampling.max_tokens} after a prompt of {length} tokens exceeds the model's context of "
                f"{self._max_length} tokens. Set it to at most {room}.",
                code="context_length_exceeded",
            )
        limit = room if default_max_tokens is None else min(room, default_max_tokens)
        return Prompt(token_ids, _thought(text), sampling.max_tokens or limit)


def _thought(prompt: str) -> Thought:
    end = prompt[-_TAIL_CHARACTERS:].rstrip()
    return "open" if end.endswith(THINK_START) else "closed" if end.endswith(THINK_END) else "none"
