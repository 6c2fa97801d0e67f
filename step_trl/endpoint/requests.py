"""What a request asks for: the bodies of `/v1/chat/completions` and `/v1/completions`, read and checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import RequestError
from .exits import ExitOptions
from .fields import IGNORED, NEUTRAL, Fields


MOST_CHOICES = 128  # of a request, in all of its prompts
_MOST_STOPS, _LONGEST_STOP = 16, 128
_MOST_PROMPTS = 128
_ROLES = ("system", "developer", "user", "assistant", "tool")
# What clients send back with an assistant's message.
_ECHOED = ("refusal", "annotations", "early_exit", "audio", "function_call", "tool_calls", "tool_call_id", "name")
# Arguments of the chat template that are not the client's to choose.
_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


@dataclass(frozen=True)
class Sampling:
    """
    What both kinds of requests say about sampling.

    `temperature`, `top_p`, `top_k` (0 for off) and `min_p` are those of the policy. `max_tokens_field` is the field
    that set `max_tokens`. `n` is the number of completions per prompt, and completion `i` of a prompt has the seed
    `seed + i`, as in vLLM.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int | None
    max_tokens_field: str
    seed: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    exits: ExitOptions
    model: str | None

    @classmethod
    def read(cls, fields: Fields, exits: ExitOptions, defaults: Mapping[str, float]) -> Sampling:
        """Take the fields. `defaults` are the model's sampling parameters."""
        given = {
            "temperature": fields.number("temperature", 0, 100),
            "top_p": fields.number("top_p", 0, 1, above=True),
            "top_k": fields.integer("top_k", -1, 2**31 - 1),
            "min_p": fields.number("min_p", 0, 1),
        }
        policy = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | dict(defaults)
        policy |= {name: value for name, value in given.items() if value is not None}
        stream = fields.flag("stream")
        limits = {name: fields.integer(name, 1, 2**31 - 1) for name in ("max_completion_tokens", "max_tokens")}
        max_tokens_field = next((name for name, value in limits.items() if value is not None), "max_tokens")
        return cls(
            temperature=float(policy["temperature"]),
            top_p=float(policy["top_p"]),
            top_k=max(0, int(policy["top_k"])),  # vLLM's -1 is off, too
            min_p=float(policy["min_p"]),
            max_tokens=limits[max_tokens_field],
            max_tokens_field=max_tokens_field,
            seed=fields.integer("seed", -(2**63), 2**63 - 1),
            stop=fields.strings("stop", _MOST_STOPS, _LONGEST_STOP),
            n=fields.integer("n", 1, MOST_CHOICES) or 1,
            stream=stream,
            include_usage=_include_usage(fields, stream),
            exits=exits.overridden(fields),
            model=fields.text("model"),
        )


@dataclass(frozen=True)
class ChatRequest:
    """The messages of a conversation, with text only, and further arguments of the chat template."""

    messages: list[dict[str, str]]
    template_options: dict[str, Any]
    sampling: Sampling

    @classmethod
    def read(cls, body: dict[str, Any], exits: ExitOptions, defaults: Mapping[str, float]) -> ChatRequest:
        """Read a body. Raises [`RequestError`]."""
        fields = Fields(body)
        messages = fields.take("messages")
        if not isinstance(messages, list) or not messages:
            raise fields.refuse("messages", "is not a list of messages. Send at least one.")
        options = fields.object("chat_template_kwargs")
        for name in options:
            if name in _RESERVED:
                raise RequestError(f"chat_template_kwargs.{name}", "is set by the endpoint. Leave it out.")
        sampling = Sampling.read(fields, exits, defaults)
        fields.end(NEUTRAL, IGNORED)
        return cls([_message(one, f"messages[{i}]") for i, one in enumerate(messages)], options, sampling)


@dataclass(frozen=True)
class CompletionRequest:
    """One prompt or several, as text or as token ids."""

    prompts: list[str | list[int]]
    sampling: Sampling

    @classmethod
    def read(cls, body: dict[str, Any], exits: ExitOptions, defaults: Mapping[str, float]) -> CompletionRequest:
        """Read a body. Raises [`RequestError`]."""
        fields = Fields(body)
        given = fields.take("prompt")
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if not all(one and (isinstance(one, str) or _are_ids(one)) for one in several):
            raise fields.refuse(
                "prompt", "is not a text, a list of token ids, or a list of either, none of them empty."
            )
        if len(several) > _MOST_PROMPTS:
            raise RequestError("prompt", f"{len(several)} prompts are too many. Send at most {_MOST_PROMPTS}.")
        sampling = Sampling.read(fields, exits, defaults)
        # The number of `logprobs` includes the sampled token, so that 0 asks for something, too.
        if fields.take("logprobs") is not None:
            raise fields.refuse("logprobs", "is not supported. Leave it out, or ask the vLLM server itself.")
        fields.end(NEUTRAL, IGNORED)
        if len(several) * sampling.n > MOST_CHOICES:
            raise RequestError(
                "n", f"{sampling.n} completions of {len(several)} prompts are more than {MOST_CHOICES}. Set fewer."
            )
        return cls(several, sampling)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = Fields(fields.object("stream_options"), "stream_options")
    if not stream and "stream_options" in fields and fields.take("stream_options") is not None:
        raise fields.refuse("stream_options", "is for streams. Set stream to true, or leave it out.")
    include = options.flag("include_usage")
    if options.flag("continuous_usage_stats"):
        raise options.refuse("continuous_usage_stats", "is not supported. Leave it out.")
    options.end(ignored=("include_obfuscation",))
    return include


def _message(value: Any, name: str) -> dict[str, str]:
    """Return a message for the chat template. Parts of its content are joined by newlines, as in vLLM."""
    if not isinstance(value, dict):
        raise RequestError(name, "is not a message. Send an object with role and content.")
    fields = Fields(value, name)
    role = fields.text("role")
    if role not in _ROLES:
        raise fields.refuse("role", f"is not a role. Set one of {', '.join(_ROLES)}.")
    for field in ("audio", "function_call", "tool_calls"):
        if value.get(field):
            raise fields.refuse(field, "is not supported. Leave it out.")
    content = fields.take("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{fields.path('content')}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str) and not (content is None and role == "assistant"):
        raise fields.refuse("content", "is not a text or a list of text parts.")
    # Templates of today know no developers.
    message = {"role": "system" if role == "developer" else role, "content": content or ""}
    thoughts = [fields.text("reasoning"), fields.text("reasoning_content")]
    if thought := next(filter(None, thoughts), None):
        message |= {"reasoning": thought, "reasoning_content": thought}
    if speaker := fields.text("name"):
        message["name"] = speaker
    fields.end(ignored=_ECHOED)
    return message


def _part(value: Any, name: str) -> str:
    if not isinstance(value, dict):
        raise RequestError(name, "is not a part of a message. Send an object with type and text.")
    fields = Fields(value, name)
    if fields.text("type") not in ("text", "refusal"):
        raise fields.refuse("type", "is not supported. Send parts of type text.")
    text = fields.text("text" if value["type"] == "text" else "refusal")
    if text is None:
        raise RequestError(fields.path("text"), "is missing. Set the text of the part.")
    return text
