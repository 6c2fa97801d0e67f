"""`step-trl serve`: run a vLLM server for rollouts in the foreground."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from ..rollout.engines import VLLMServer
from .sources import model_source


def serve(model: str, host: str, port: int, max_model_len: int | None, extra_arguments: Sequence[str]) -> int:
    """Run a server in the foreground until it exits, or until Ctrl-C or SIGTERM stops it. Return its exit status."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    server = VLLMServer(
        model_source(model), host=host, port=port, max_model_len=max_model_len, extra_arguments=extra_arguments
    )
    print(f"Starting vLLM:\n{server.command_line}", flush=True)
    try:
        with server:
            print(f"Serving {model} at {server.url} (Ctrl-C ends it)", flush=True)
            return server.wait()
    except KeyboardInterrupt:
        return 0
