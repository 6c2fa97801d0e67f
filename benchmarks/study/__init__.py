"""The testbed study: every comparison of both papers at the testbed's scale, with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .arms import ARMS, jobs
from .page import write_page
from .records import collect_records, read_records, write_records
from .run import check_settings, note_settings, run_study


def study(
    output_dir: Path, page: Path, arms: Sequence[str], seeds: Sequence[int], max_steps: int, page_only: bool = False
) -> None:
    """
    Run the unfinished parts of the study, or none with `page_only`, and write its page and its records.

    `output_dir` is the folder for models and samples, `page` that for the page and its records. Trainings in these
    records are not run again, wherever they ran, except for arms whose settings have changed. A training that is also
    in `output_dir` is read from there.
    """
    chosen = jobs(seeds, arms)
    changed = check_settings("page", page, max_steps, but_for=[arm.name for arm in ARMS])
    if page_only:
        check_settings("output_dir", output_dir, max_steps)
    else:
        run_study(output_dir, chosen, max_steps, read_records(page).without(changed).done)
    newer = collect_records(output_dir)
    again = {arm for arm, _ in newer.done} & changed.keys()
    records = read_records(page).without(again).updated_by(newer)
    old = {arm: changes for arm, changes in changed.items() if arm not in again}
    note_settings(page, max_steps, old)
    write_records(records, page)
    write_page(records, page, max_steps, old)
