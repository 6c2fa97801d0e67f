"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace


# Two workers share two cores. Before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


# Helpers of the tests (`rollout.scripted_engine`) are imported by their path below `tests/`.
sys.path.insert(0, str(Path(__file__).parent))

import slow


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what takes long to make run in one worker: a vLLM server of each kind, pairs of processes."""
    for item in items:
        if item.path.stem in slow.FILES or getattr(item, "originalname", None) in slow.TESTS:
            item.add_marker("slow")
        if {"vllm_server", "mortal_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("vllm"))
            item.add_marker("slow")
        elif item.path.name == "test_two_ranks.py":
            item.add_marker(pytest.mark.xdist_group("two ranks"))


def pytest_collection_finish() -> None:
    """Each training collects the garbage, which takes half a second to look through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def preloaded_servers():
    """vLLM servers that need not import torch and vLLM. One that is started in another process does."""
    from preloaded import PreloadedPython

    from step_trl import serve

    def popen(command, *, env, stdout=None, **_):
        return PreloadedPython(command[1:], os.devnull if stdout is None else stdout.name, env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
        yield


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory):
    """A vLLM server of the testbed model, one for all tests of the session."""
    with _server(tmp_path_factory, "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def mortal_server(tmp_path_factory):
    """Another one. Tests may kill it, if they start it again; what weights it has is theirs to say."""
    with _server(tmp_path_factory, "mortal.log") as server:
        yield server


def _server(tmp_path_factory: pytest.TempPathFactory, log_name: str):
    from step_trl.serve import VLLMServer
    from step_trl.testbed import MODEL_DIR

    log_file = tmp_path_factory.mktemp("vllm") / log_name
    return VLLMServer(MODEL_DIR, max_model_len=1024, log_file=log_file, start_timeout=300)
