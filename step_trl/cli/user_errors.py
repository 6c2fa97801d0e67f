"""Tell errors that the user of a command can fix, which are reported in one line, from bugs."""

from __future__ import annotations

import traceback
from collections.abc import Collection


# Functions of other packages that read the user's input: whatever they raise is about that input.
READERS = {"__post_init__", "from_pretrained", "load_dataset"}


def is_user_error(error: BaseException, packages: Collection[str] = ("step_trl", "trl")) -> bool:
    """
    Return whether an error is due to the command line, or to a file, model, data set or server that it names.

    User errors are those that one of the packages raises explicitly, such as the check of an option, those of a
    configuration or of loading something, and those of the operating system. Anything that Python or torch raises
    elsewhere is a bug.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError) or any(frame.f_code.co_name in READERS for frame, _ in frames):
        return True
    statement = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return statement.startswith("raise") and package_of(error) in packages


def package_of(error: BaseException) -> str:
    """Return the name of the package whose code raised the error."""
    last = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return str(last.f_globals.get("__name__")).partition(".")[0]


def message_of(error: BaseException) -> str:
    """Return the message of an error: all of it if this package raised it, otherwise its first line."""
    text = str(error).strip() or type(error).__name__
    return text if package_of(error) == "step_trl" else text.splitlines()[0]
