"""The fields of a request's body, taken one by one with their types and ranges checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from .errors import RequestError, shown


# Fields without an effect on what is sampled.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "request_id",
)  # fmt: skip
# Fields that are not supported, and the values with which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "reasoning_effort": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "include_reasoning": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
}
_LONGEST_NAME = 80  # characters of a field in a message
_NO_LOGPROBS = (
    "Tokens that the endpoint writes to end a thought have none. Leave it out, or ask the vLLM server itself."
)
REMEDIES = {
    "logprobs": _NO_LOGPROBS,
    "top_logprobs": _NO_LOGPROBS,
    "reasoning_effort": "Set exit_confidence or thinking_token_budget instead.",
}


def read_body(content: bytes) -> dict[str, Any]:
    """Decode a body, which must be a JSON object."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(None, f"The body is not JSON ({error}). Send a JSON object.") from None
    if not isinstance(body, dict):
        raise RequestError(None, f"The body is {shown(body)}. Send a JSON object.")
    return body


class Fields:
    """
    The fields of a body, or of an object in it. Each is taken once, and [`Fields.end`] refuses the others.

    A field that is `null` counts as missing.

    Args:
        values (`Mapping[str, Any]`):
            The object.
        name (`str`, *optional*):
            Its name in error messages, such as `"messages[0]"`.
    """

    def __init__(self, values: Mapping[str, Any], name: str = ""):
        self._values = values
        self._name = name
        self._taken: set[str] = set()

    def __contains__(self, field: str) -> bool:
        return field in self._values

    def path(self, field: str) -> str:
        """Return the full name of a field."""
        return f"{self._name}.{field}" if self._name else field

    def take(self, field: str) -> Any:
        """Take a field of any type, `None` if it is missing."""
        self._taken.add(field)
        return self._values.get(field)

    def refuse(self, field: str, problem: str) -> RequestError:
        """Return the error that names a field and its value."""
        return RequestError(self.path(field), f"{shown(self._values.get(field))} {problem}")

    def number(self, field: str, low: float, high: float, *, above: bool = False) -> float | None:
        """Take a number from `low` to `high`, or above `low`."""
        value = self.take(field)
        if value is None:
            return None
        inside = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not inside or (above and value == low):
            least = "more than" if above else "at least"
            most = "" if math.isinf(high) else f" and at most {high:g}"
            raise self.refuse(field, f"is not a number in range. Set {least} {low:g}{most}.")
        return float(value)

    def integer(self, field: str, low: int, high: int) -> int | None:
        """Take an integer from `low` to `high`."""
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(field, f"is not an integer in range. Set an integer from {low} to {high}.")
        return value

    def flag(self, field: str) -> bool:
        """Take `true` or `false`, which is the default."""
        value = self.take(field)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(field, "is not a boolean. Set true or false.")
        return bool(value)

    def text(self, field: str) -> str | None:
        """Take a string."""
        value = self.take(field)
        if value is not None and not isinstance(value, str):
            raise self.refuse(field, "is not a string.")
        return value

    def object(self, field: str) -> dict[str, Any]:
        """Take an object, by default an empty one."""
        value = self.take(field)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(field, "is not an object.")
        return value or {}

    def strings(self, field: str, most: int, longest: int) -> tuple[str, ...]:
        """Take a string, or a list of at most `most` ones, none of them empty or longer than `longest`."""
        value = self.take(field)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list) or len(found) > most:
            raise self.refuse(field, f"is not a string or a list of at most {most}.")
        if not all(isinstance(one, str) and 0 < len(one) <= longest for one in found):
            raise self.refuse(field, f"has an entry that is not a string of 1 to {longest} characters.")
        return tuple(found)

    def end(self, unsupported: Collection[str] = (), ignored: Collection[str] = ()) -> None:
        """Refuse the fields that were not taken, unless they ask for nothing."""
        for field, value in self._values.items():
            if field in self._taken or field in ignored or value is None:
                continue
            if field not in unsupported:
                near = difflib.get_close_matches(field[:_LONGEST_NAME], self._taken, 1)
                remedy = f"Set {near[0]}, or leave it out." if near else "Leave it out."
                raise RequestError(self.path(field)[:_LONGEST_NAME], f"{shown(value)}: unknown field. {remedy}")
            # Numbers ask for nothing in both types, but JSON's `true` is not 1.
            same_kind = [one for one in NEUTRAL[field] if isinstance(one, bool) == isinstance(value, bool)]
            if value not in same_kind:
                raise self.refuse(field, f"is not supported. {REMEDIES.get(field, 'Leave it out.')}")
