"""`vllm_mode="colocate"`: the checks of `colocated_checks.py`, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from step_trl.serve import free_port


@pytest.mark.timeout(600)
def test_colocated_model():
    checks = Path(__file__).with_name("colocated_checks.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--timeout=500", str(checks)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
