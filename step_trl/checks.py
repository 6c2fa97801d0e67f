"""Checks of arguments and options that are a number in a range, or one of a few names."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a `ValueError` if the argument `name` is not one of the `choices`, a `Literal`."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not known. Set one of {', '.join(map(repr, known))}.")


def check_choices(options: object, **choices: Any) -> None:
    """Apply [`check_choice`] to attributes of `options`."""
    for name, known in choices.items():
        check_choice(name, getattr(options, name), known)


def check_least(options: object, **least: float) -> None:
    """Raise a `ValueError` if an attribute of `options` is below its least value. It may be `None`."""
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name}: {value} is too small. Set at least {lowest}.")
