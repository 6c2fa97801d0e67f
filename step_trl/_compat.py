"""The TRL versions that the trainers' hooks are written for."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet


SUPPORTED_TRL = ">=1.16,<1.17"


def check_trl_version(installed: str | None = None) -> None:
    """
    Fail at import where TRL is not one that the hooks fit.

    Args:
        installed (`str`, *optional*):
            Version to check; the installed one by default.

    Raises:
        `ImportError`: names the installed version and what to install.
    """
    installed = version("trl") if installed is None else installed
    if installed not in SpecifierSet(SUPPORTED_TRL, prereleases=True):
        raise ImportError(
            f"step_trl supports trl{SUPPORTED_TRL}, found trl=={installed}. Run: pip install 'trl{SUPPORTED_TRL}'"
        )
