"""
The testbed study: every comparison of both papers, trained and evaluated on the testbed.

    python benchmarks/study                  # resumes an interrupted study
    python benchmarks/study --page-only      # writes the page for the finished trainings
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package `study`

from step_trl.cli.user_errors import is_user_error, message_of
from study import study


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/study", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"), help="folder for models and samples")
    parser.add_argument("--page", type=Path, default=Path(__file__).parent, help="folder for the tables and figures")
    parser.add_argument("--arms", nargs="*", default=[], metavar="NAME", help="arms to run, by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=40, help="number of updates of an arm")
    parser.add_argument("--page-only", action="store_true", help="write the page for the finished trainings")
    options = parser.parse_args()
    try:
        study(**vars(options))
    except Exception as error:
        if not is_user_error(error, packages=("study", "step_trl", "trl")):
            raise
        parser.exit(2, f"{parser.prog}: error: {message_of(error)}\n")


if __name__ == "__main__":
    main()
