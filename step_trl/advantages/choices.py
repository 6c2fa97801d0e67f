"""Check arguments that are one of a few names."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a `ValueError` if the argument `name` is not one of the `choices`, a `Literal`."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not known. Set one of {', '.join(map(repr, known))}.")
