"""Fixtures that several folders of tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


# Helpers of the tests (`rollout.scripted_engine`) are imported by their path below `tests/`.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory):
    """A vLLM server of the testbed model, one for all tests of the session."""
    with _server(tmp_path_factory, "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def mortal_server(tmp_path_factory):
    """Another one. The tests of a module may kill it, if they start it again."""
    with _server(tmp_path_factory, "mortal.log") as server:
        yield server


def _server(tmp_path_factory: pytest.TempPathFactory, log_name: str):
    from step_trl.serve import VLLMServer
    from step_trl.testbed import MODEL_DIR

    log_file = tmp_path_factory.mktemp("vllm") / log_name
    return VLLMServer(MODEL_DIR, max_model_len=1024, log_file=log_file, start_timeout=300)
