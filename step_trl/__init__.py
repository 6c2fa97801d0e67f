"""Efficient-reasoning variants of TRL's `GRPOTrainer`: Step-GRPO, SAS and their family."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._compat import check_trl_version, silence_triton_check
from ._version import __version__ as __version__


check_trl_version()
silence_triton_check()

if TYPE_CHECKING:
    from .trainers import *  # noqa: F403


def __getattr__(name: str):
    # The trainers import torch and TRL, which takes seconds: segmenters, rewards and grading do without. Submodules,
    # which Python also looks up here, have lower-case names.
    if name == "__all__" or name[:1].isupper():
        trainers = import_module(".trainers", __name__)
        if name == "__all__":
            return [*trainers.__all__, "__version__"]
        if name in trainers.__all__:
            return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
