"""The testbed study: every comparison of both papers at the testbed's scale, with seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arms import jobs
from .page import write_page
from .records import collect_records, read_records, write_records
from .run import check_settings, run_study


def study(
    output_dir: Path, page: Path, arms: Sequence[str], seeds: Sequence[int], max_steps: int, page_only: bool = False
) -> None:
    """
    Run what is not done of the study, and write its page and its records.

    Args:
        output_dir (`Path`):
            For models and samples.
        page (`Path`):
            For the page and its records. What they hold is done, wherever it was run; a training that `output_dir`
            holds as well is taken from there.
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
    check_settings("page", page, max_steps)
    if not page_only:
        run_study(output_dir, chosen, max_steps, read_records(page).done)
    records = read_records(page).updated_by(collect_records(output_dir))
    write_records(records, page)
    write_page(records, page, max_steps)
