"""Train the visual testbed's model from scratch, see `pretrain.py`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from testbed_model.command import run_command
from testbed_model.vision.pretrain import Recipe, pretrain


def main() -> None:
    run_command("python benchmarks/testbed_model/vision", __doc__, Recipe, pretrain)


if __name__ == "__main__":
    main()
