"""Run on two processes, with DDP or FSDP2. Start-up takes longest, so this is all that is tested there."""

import sys
from pathlib import Path

from trainers import equal_ranks, resumed_run


def main(folder: Path, how: str) -> None:
    for method in ("step_grpo", "sas"):
        equal_ranks.train(method, folder, 2, how)
    for method in ("step_grpo", "sas") if how == "ddp" else ("step_grpo",):
        resumed_run.train_and_resume(method, folder / how, how)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
