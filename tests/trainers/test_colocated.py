"""`vllm_mode="colocate"`: the checks of `colocated_checks.py`, in a process of their own."""

import os
from pathlib import Path

import pytest
from preloaded import run_preloaded

from step_trl.rollout.engines.vllm_process import free_port


@pytest.mark.timeout(600)
def test_colocated_model(tmp_path):
    checks = Path(__file__).with_name("colocated_checks.py")
    environment = os.environ | {
        "MASTER_PORT": str(free_port()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--timeout=500", str(checks)]
    status, output = run_preloaded(command, tmp_path / "output", env=environment, timeout=540)
    assert status == 0, output[-5000:]
    assert " passed" in output and "skipped" not in output
