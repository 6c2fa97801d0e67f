"""Errors of the endpoint, in the shape of OpenAI's."""

from __future__ import annotations

from typing import Any


_LONGEST = 80  # characters of a value in a message


class RequestError(Exception):
    """
    A request that cannot be served.

    Args:
        param (`str`, *optional*):
            The field that is wrong. It opens the message.
        problem (`str`):
            What is wrong, with the value, and what to do instead.
        status (`int`, *optional*, defaults to `400`), code (`str`, *optional*):
            HTTP status, and OpenAI's word for the error.
    """

    def __init__(self, param: str | None, problem: str, status: int = 400, code: str | None = None):
        super().__init__(problem if param is None else f"{param}: {problem}")
        self.param = param
        self.status = status
        self.code = code


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    if isinstance(value, (str, bytes)):
        value = value[:_LONGEST]
    text = repr(value[:_LONGEST] if isinstance(value, list) else value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error response."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
