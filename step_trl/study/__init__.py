"""The testbed study: every comparison of both papers at the testbed's scale, with seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arms import jobs
from .page import write_page
from .run import run_study


def study(
    output_dir: Path, page: Path, arms: Sequence[str], seeds: Sequence[int], max_steps: int, page_only: bool = False
) -> None:
    """
    Run what is not done of the study, and write its page.

    Args:
        output_dir (`Path`):
            For models and samples.
        page (`Path`):
            For the page.
        arms (`Sequence[str]`):
            Names; all arms if there are none.
        seeds (`Sequence[int]`):
            The first one is that of the sweeps.
        max_steps (`int`):
            Updates of an arm.
        page_only (`bool`, *optional*, defaults to `False`):
            Train nothing.
    """
    chosen = jobs(seeds, arms)
    if not page_only:
        run_study(output_dir, chosen, max_steps)
    write_page(output_dir, page, max_steps)
