"""Bodies of responses, whole and streamed, in the shape of OpenAI's and vLLM's."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import msgspec

from .completions import Choice, Completions
from .text import Delta


END_OF_STREAM = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


def event(body: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + _ENCODER.encode(body) + b"\n\n"


class ResponseFormat:
    """
    Writes the response of one request.

    A thought is the field `reasoning` of a chat message, as vLLM's reasoning parsers name it. A text completion has
    its thought in its text.

    Args:
        kind (`"chat"` or `"text"`):
            Kind of the request.
        model (`str`):
            Name of the model.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str):
        self._is_chat = kind == "chat"
        self._object = "chat.completion" if self._is_chat else "text_completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, completions: Completions) -> bytes:
        """Return the body of a response without streaming."""
        choices = [self._choice(choice) for choice in completions.choices]
        return _ENCODER.encode(
            {**self._head, "object": self._object, "choices": choices, "usage": completions.usage()}
        )

    def opening(self, completions: Completions) -> bytes:
        """Return the events that open a stream: the role of each chat message."""
        if not self._is_chat:
            return b""
        first = {"role": "assistant", "content": ""}
        return b"".join(self._chunk([{"index": one.index, "delta": first, "finish_reason": None}])
                        for one in completions.choices)  # fmt: skip

    def further(self, choice: Choice, delta: Delta, is_last: bool) -> bytes:
        """Return the event of further text, with the finish reason and the report if it is the last."""
        written: dict[str, Any] = {"index": choice.index}
        if self._is_chat:
            named = {"reasoning": delta.reasoning, "content": delta.content}
            written["delta"] = {name: text for name, text in named.items() if text}
        else:
            written["text"] = delta.content
        written["finish_reason"] = choice.finish_reason if is_last else None
        if is_last:
            written["early_exit"] = choice.early_exit
        return self._chunk([written])

    def usage(self, completions: Completions) -> bytes:
        """Return the event with the usage, which has no choices."""
        return self._chunk([], usage=completions.usage())

    def _chunk(self, choices: list[dict[str, Any]], **further: Any) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return event({**self._head, "object": kind, "choices": choices, **further})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        if self._is_chat:
            message = {"role": "assistant", "content": choice.content or None, "refusal": None}
            written: dict[str, Any] = {"message": message | {"reasoning": choice.reasoning or None}}
        else:
            written = {"text": choice.content}
        ends = {"logprobs": None, "finish_reason": choice.finish_reason, "early_exit": choice.early_exit}
        return {"index": choice.index, **written, **ends}
