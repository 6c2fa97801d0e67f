"""
TRL's own weight synchronisation, of a server by its trainers, on CPUs: `weight_sync="nccl"` without NCCL.

All of it is the code of TRL and vLLM but for the transport: `tcp_transfer.py` names each line that is replaced.
"""

import json
from pathlib import Path

import pytest
from trainers.synchronised_runs import CLASSES, UPDATES, train
from trainers.two_processes import run_two_processes


pytestmark = pytest.mark.timeout(600)


def assert_synchronised(found, processes):
    assert found["processes"] == processes
    assert len(found["differences"]) == UPDATES + 1
    assert all(after < 1e-4 for _, after in found["differences"])
    assert all(before > 1e-2 for before, _ in found["differences"][1:])  # each update has moved the policy
    assert len(found["sampled"]) == UPDATES and max(found["sampled"]) < 1e-3


@pytest.mark.parametrize("method", CLASSES)
def test_a_server_follows_its_trainer(method, vllm_server, tmp_path):
    assert_synchronised(train(method, "alone", vllm_server.url, tmp_path), processes=1)


def test_a_server_follows_two_processes(vllm_server, tmp_path):
    """With DDP and with FSDP2, whose parameters are gathered one by one while they are sent."""
    ended = run_two_processes(
        Path(__file__).with_name("synchronised_runs.py"), [vllm_server.url, str(tmp_path)], tmp_path, seconds=480
    )
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {f"{method}-{how}" for method in CLASSES for how in ("ddp", "fsdp2")}
    for one in found.values():
        assert_synchronised(one, processes=2)
