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
    from step_trl.serve import VLLMServer
    from step_trl.testbed import MODEL_DIR

    log_file = tmp_path_factory.mktemp("vllm") / "server.log"
    with VLLMServer(MODEL_DIR, max_model_len=1024, log_file=log_file, start_timeout=300) as server:
        yield server
