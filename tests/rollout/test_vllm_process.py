"""
Servers as processes: they end with the process that started them, however that ends.

The class is the real one, the server a quick one. vLLM's own is started in many other tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from rollout.server_metrics import until

from step_trl.rollout.engines import vllm_process
from step_trl.rollout.engines.supervise import POLL_SECONDS
from step_trl.rollout.engines.vllm_process import VLLMServer, free_port, server_command, start_supervised


HEALTH_SERVER = Path(__file__).with_name("health_server.py")


def parent(command: list[str], port: int, healthy) -> None:
    """Another process: starts a server from a thread that ends before it does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server = VLLMServer("model", port=port)
    server._command = [sys.executable, *command, str(port)]
    vllm_process.start_supervised = start_supervised
    starting = threading.Thread(target=server.start)
    starting.start()
    starting.join()
    healthy.set()
    time.sleep(600)


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the running processes, without zombies."""
    _, alive = psutil.wait_procs(processes, timeout=0)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`started(command)`: a server of that command."""
    monkeypatch.setattr(vllm_process, "start_supervised", start_supervised)  # whatever starts servers in other tests
    servers = []

    def started(command):
        servers.append(VLLMServer("model", log_file=tmp_path / "log", start_timeout=60))
        servers[-1]._command = [sys.executable, *command, str(servers[-1].port)]
        servers[-1].start()
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_server_ends_with_its_parent(number):
    fork = multiprocessing.get_context("fork")  # which has torch already
    healthy = fork.Event()
    process = fork.Process(target=parent, args=([str(HEALTH_SERVER)], free_port(), healthy))
    process.start()
    try:
        assert healthy.wait(60)
        time.sleep(2 * POLL_SECONDS)
        processes = psutil.Process(process.pid).children(recursive=True)
        assert len(running(processes)) == 3  # what looks after the server, the server, and its engine
    finally:
        os.kill(process.pid, number)
        process.join()
    assert process.exitcode == -number
    assert until(lambda: not running(processes), seconds=10)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_nothing_of_a_server_is_left(started, end):
    before = psutil.Process().children(recursive=True)
    server = started([str(HEALTH_SERVER)])
    processes = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert len(running(processes)) == 3
    getattr(server, end)()
    assert until(lambda: not running(processes), seconds=5)


def test_how_a_server_ended_is_told(started):
    with pytest.raises(RuntimeError, match="ended with status 3 before it was healthy"):
        started(["-c", "exit(3)"])
    server = started([str(HEALTH_SERVER)])
    (process,) = psutil.Process(server._process.pid).children()
    process.kill()
    assert server.wait() == 128 + signal.SIGKILL


def test_an_adapter_is_no_model_to_serve(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    remedy = r"by step_trl\.rollout\.engines\.adapters\.merge_adapter"
    with pytest.raises(ValueError, match=rf"model: .* holds a LoRA adapter.* {remedy}"):
        VLLMServer(tmp_path)


@pytest.mark.parametrize(
    "own",
    [
        ["--weight-transfer-config", '{"backend": "ipc"}'],
        ['--weight-transfer-config={"backend": "ipc"}'],
        ["--weight_transfer_config.backend", "ipc"],
    ],
    ids=" ".join,
)
def test_weights_go_by_nccl_on_gpus_unless_the_user_says_how(own):
    """Checked with vLLM's own parser."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def backend(*further, cpu=False):
        command, _ = server_command("model", extra_arguments=further, cpu=cpu)
        config = AsyncEngineArgs.from_cli_args(parser.parse_args(command[3:])).weight_transfer_config
        return config and config.backend

    assert backend() == "nccl"
    assert backend(cpu=True) is None
    assert backend(*own) == backend(*own, cpu=True) == "ipc"


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize(("host", "enabled"), [("127.0.0.1", True), ("localhost", True), ("10.0.0.2", False)])
def test_weights_can_be_changed_only_from_this_machine(host, enabled, cpu):
    """The host decides, whether or not there is a GPU, as docs/how-to/eight-gpus.md says."""
    _, environment = server_command("model", host=host, cpu=cpu)
    assert ("VLLM_SERVER_DEV_MODE" in environment) == enabled
