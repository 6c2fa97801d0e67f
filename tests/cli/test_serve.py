"""`step-trl serve`, as a command: what it would start, what it refuses, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import urllib.request

import openai
import psutil
import pytest
from preloaded import PreloadedPython
from rollout.server_metrics import until
from small_runs import refused

from step_trl import testbed
from step_trl.cli.main import main
from step_trl.rollout.engines.vllm_process import free_port


EXITS = ["serve", "testbed", "--exit-confidence", "0.95"]
KEY = "sk-only-for-this-test"


def printed(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_a_dry_run_of_a_server_alone(capsys):
    told = printed(capsys, "serve", "testbed", "--dry-run", "--port", "8123", "--max-num-seqs", "4")
    assert told.startswith("vLLM server at http://127.0.0.1:8123:\n")
    assert f"--model {testbed.MODEL_DIR} " in told and "--max-num-seqs 4" in told and "Endpoint" not in told


def test_a_dry_run_of_an_endpoint(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    more = ["--thinking-token-budget", "500", "--host", "0.0.0.0", "--max-num-seqs", "4"]
    told = printed(capsys, *EXITS, "--dry-run", *more)
    (behind,) = re.findall(r"^vLLM server at (http://127\.0\.0\.1:\d+):$", told, re.MULTILINE)
    assert "--host 127.0.0.1 " in told and "--max-num-seqs 4" in told and KEY not in told
    assert told.endswith(
        f"Endpoint at http://0.0.0.0:8000/v1, before {behind}, with the API key of VLLM_API_KEY: "
        "exit_confidence 0.95, thinking_token_budget 500\n"
    )


def test_a_dry_run_before_running_servers(capsys):
    told = printed(capsys, *EXITS, "--dry-run", "--urls", "http://10.0.0.2:8000", "http://10.0.0.3:8000")
    assert told == (
        "Endpoint at http://127.0.0.1:8000/v1, before http://10.0.0.2:8000, http://10.0.0.3:8000, without an API key: "
        "exit_confidence 0.95\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "testbed", "--exit-confidence", "2"], "exit_confidence: 2 is not between 0 and 1"),
        (["serve", "testbed", "--exit-consistency", "1"], "exit_consistency: 1 is too small"),
        (["serve", "testbed", "--urls", "http://127.0.0.1:9"], "urls: is for an endpoint .* Set --exit-confidence"),
        ([*EXITS, "--api-key", KEY], "api-key: other users .* Set VLLM_API_KEY in the environment"),
        ([*EXITS, f"--api_key={KEY}"], "api-key: other users .* Set VLLM_API_KEY in the environment"),
        ([*EXITS, "--urls", "http://127.0.0.1:9", "--max-num-seqs=4"], "urls: these servers run already"),
        ([*EXITS, "--urls", "http://127.0.0.1:9", "--max-model-len", "99"], "urls: these servers run already"),
        ([*EXITS, "--urls", "http://127.0.0.1:9"], "http://127.0.0.1:9 did not answer"),
        (["serve", "empty", *EXITS[2:]], "model: empty cannot be loaded: it has no readable config.json"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_told_in_a_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(capsys, message):
        main(arguments)


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def served(tmp_path, executable, port, *arguments: str) -> PreloadedPython:
    command = ["-m", "step_trl", *EXITS, "--port", str(port), *arguments]
    environment = os.environ | {"VLLM_API_KEY": KEY}
    return PreloadedPython(command, tmp_path / "log", environment, executable=executable)


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "the server is killed"])
@pytest.mark.timeout(300)
def test_the_endpoint_and_its_server_end_together(tmp_path, preloaded_executable, end):
    port = free_port()
    process = served(tmp_path, preloaded_executable, port, "--max-model-len", "512")
    try:
        assert until(lambda: is_healthy(port) or process.poll() is not None, seconds=200)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        (choice,) = client.completions.create(model="testbed", prompt="1 + 1", max_tokens=4).choices
        assert choice.text
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        # A request that runs does not hold up the end.
        stream = client.completions.create(model="testbed", prompt="1 + 1", max_tokens=400, stream=True)
        next(stream)
        if end == "the server is killed":
            for one in started:
                one.kill()
        else:
            process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGTERM)
        status = process.wait(30)
        assert (status == 0) == (end != "the server is killed"), (tmp_path / "log").read_text()
        assert until(lambda: not any(one.is_running() for one in started), seconds=10)
        assert not is_healthy(port)
    finally:
        process.kill()


def test_an_address_that_is_taken_is_told_in_a_line(tmp_path, preloaded_executable, vllm_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = served(tmp_path, preloaded_executable, taken.getsockname()[1], "--urls", vllm_server.url)
        assert process.wait(60) == 2
    told = (tmp_path / "log").read_text()
    assert "address already in use" in told and "Traceback" not in told
