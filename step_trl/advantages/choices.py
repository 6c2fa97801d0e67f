"""Check arguments that are one of a few names."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """
    Raise a `ValueError` if a value is not one of the choices.

    Args:
        name (`str`):
            The name of the argument in the message.
        value (`object`):
            The value to check.
        choices (`Literal[...]`):
            The type that lists the choices.
    """
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not known. Set one of {', '.join(map(repr, known))}.")
