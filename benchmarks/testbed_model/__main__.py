"""Train the testbed model from scratch, see `pretrain.py`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from testbed_model.command import run_command
from testbed_model.pretrain import Recipe, pretrain


SMALLEST = ("--updates", "1")  # for tests


def main() -> None:
    run_command("python benchmarks/testbed_model", __doc__, Recipe, pretrain)


if __name__ == "__main__":
    main()
