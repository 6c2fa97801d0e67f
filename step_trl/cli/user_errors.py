"""Which errors of a command its user can mend, and how they are told: in one line. All others are bugs."""

from __future__ import annotations

import traceback


# Functions of other packages that read what the user gave: whatever they raise is about that.
READERS = {"__post_init__", "from_pretrained", "load_dataset"}


def is_user_error(error: BaseException) -> bool:
    """
    Whether the command line, or a file, model, data set or server that it names, is to blame.

    These are errors that this package or TRL raises by a statement of its own, such as the check of an option, those
    of a configuration or of something that is loaded, and those of the operating system. What Python or torch raise
    somewhere else is a bug.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError) or any(frame.f_code.co_name in READERS for frame, _ in frames):
        return True
    statement = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return statement.startswith("raise") and package_of(error) in ("step_trl", "trl")


def package_of(error: BaseException) -> str:
    """Name of the package whose code raised the error."""
    last = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return str(last.f_globals.get("__name__")).partition(".")[0]


def message_of(error: BaseException) -> str:
    """The message of an error: all of ours, and of another package's what its first line says."""
    text = str(error).strip() or type(error).__name__
    return text if package_of(error) == "step_trl" else text.splitlines()[0]
