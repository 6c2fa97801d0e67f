"""Two processes of one training, without an agent that stops one when the other fails."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from preloaded import PreloadedPython

from step_trl.rollout.engines.vllm_process import free_port


def run_two_processes(script: Path, arguments: Sequence[str], folder: Path, seconds: float) -> list[tuple[int, str]]:
    """Return each rank's exit status and output. Raise `subprocess.TimeoutExpired` if one does not end in time."""
    helpers = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": helpers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    logs = [folder / f"{script.stem}.{rank}.log" for rank in (0, 1)]
    processes = []
    deadline = time.monotonic() + seconds
    try:
        for rank, log in enumerate(logs):
            ranked = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(PreloadedPython([str(script), *arguments], log, env=ranked))
        statuses = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        error.output = b"".join(log.read_bytes()[-3000:] for log in logs)
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(status, log.read_text(errors="replace")) for status, log in zip(statuses, logs)]
