"""
Run the blocks of the GPU campaign one after another, each in a process of its own.

    python benchmarks/gpu                                          # in 9 minutes, and again to go on
    python benchmarks/gpu --blocks engine_speed step_memory --minutes 5

Every block saves its rows as it measures them, and leaves out those that it has. A block that fails does not end the
campaign.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


BLOCKS = ("correctness", "engine_speed", "step_memory", "larger_testbed", "demo")
IMPORTS = 0.4  # minutes that a process takes until it measures, and from its last row to its end
SMALLEST = ("--blocks", "engine_speed", "--minutes", "0")  # for tests


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"), help="by default %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all blocks together, by default %(default)g")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="in this order")
    options = parser.parse_args()
    deadline, failed = time.monotonic() + 60 * options.minutes, []
    for name in options.blocks:
        left = max(0.0, (deadline - time.monotonic()) / 60 - IMPORTS)
        print(f"{name}: {left:.1f} minutes are left", flush=True)
        script = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, str(script), "--output-dir", str(options.output_dir), "--minutes", str(left)]
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed, see above. The same command tries again.")


if __name__ == "__main__":
    main()
