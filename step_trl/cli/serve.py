"""`step-trl serve`: run a vLLM server in the foreground, for rollouts or behind an endpoint with early exits."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from transformers import AutoTokenizer

from ..endpoint import ExitOptions, sampling_defaults, serve_endpoint
from ..rollout.engines import VLLMServer, VLLMServerEngine
from .sources import check_model, model_source


API_KEY = "VLLM_API_KEY"  # the environment variable
# Enough for a connection that the server closed as it was used. Clients should not wait for a server that is down.
RETRY_SECONDS = 2.0


def serve(
    model: str,
    host: str,
    port: int,
    max_model_len: int | None,
    extra_arguments: Sequence[str],
    *,
    exit_confidence: float | None = None,
    exit_consistency: int | None = None,
    thinking_token_budget: int | None = None,
    urls: Sequence[str] | None = None,
    dry_run: bool = False,
) -> int:
    """
    Serve in the foreground until the server exits, or until Ctrl-C or SIGTERM stops it. Return its exit status.

    With an option about exits, the endpoint listens on `host` and `port`, and the vLLM server on another port of this
    machine, or at `urls`. A `dry_run` only prints what would be started.
    """
    exits = ExitOptions(exit_confidence, exit_consistency, thinking_token_budget)
    if exits == ExitOptions():
        if urls is not None:
            raise ValueError("urls: is for an endpoint with early exits. Set --exit-confidence, too.")
        server = VLLMServer(
            model_source(model), host=host, port=port, max_model_len=max_model_len, extra_arguments=extra_arguments
        )
        return _serve_vllm(model, server, dry_run)
    if any(re.match("--api[-_]key", word) for word in extra_arguments):
        raise ValueError(f"api-key: other users of this machine could read it. Set {API_KEY} in the environment.")
    if urls is not None and (extra_arguments or max_model_len is not None):
        raise ValueError("urls: these servers run already. Leave out the arguments of vLLM.")
    return _serve_endpoint(model, host, port, max_model_len, extra_arguments, exits, urls, dry_run)


def _serve_vllm(model: str, server: VLLMServer, dry_run: bool) -> int:
    if dry_run:
        print(f"vLLM server at {server.url}:\n{server.command_line}")
        return 0
    print(f"Starting vLLM:\n{server.command_line}", flush=True)

    def wait() -> int:
        print(f"Serving {model} at {server.url} (Ctrl-C ends it)", flush=True)
        return server.wait()

    return _run_server(server, wait)


def _run_server(server: VLLMServer | None, serve_until_end: Callable[[], int]) -> int:
    """Start a server and end it, whatever happens. Ctrl-C and SIGTERM are an end like others."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        with nullcontext() if server is None else server:
            return serve_until_end()
    except KeyboardInterrupt:
        return 0


def _serve_endpoint(
    model: str,
    host: str,
    port: int,
    max_model_len: int | None,
    extra_arguments: Sequence[str],
    exits: ExitOptions,
    urls: Sequence[str] | None,
    dry_run: bool,
) -> int:
    source, api_key = model_source(model), os.environ.get(API_KEY)
    check_model(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    server: VLLMServer | None = None
    if urls is None:
        server = VLLMServer(source, max_model_len=max_model_len, extra_arguments=extra_arguments, api_key=api_key)
        urls = [server.url]
        print(f"vLLM server at {server.url}:\n{server.command_line}", flush=True)
    if dry_run:
        key = f"with the API key of {API_KEY}" if api_key else "without an API key"
        print(f"Endpoint at {address}, before {', '.join(urls)}, {key}: {exits.describe()}")
        return 0
    logging.basicConfig(format="%(levelname)s: %(message)s")
    engine = VLLMServerEngine(urls, tokenizer, api_key=api_key, retry_window=RETRY_SECONDS)

    def serve_until_end() -> int:
        serving = serve_endpoint(
            engine,
            exits,
            host=host,
            port=port,
            names=[model],
            defaults=sampling_defaults(source),
            api_key=api_key,
            server_status=(lambda: None) if server is None else server.poll,
            on_ready=lambda: print(f"Serving {model} at {address} (Ctrl-C ends it): {exits.describe()}", flush=True),
        )
        return asyncio.run(serving)

    return _run_server(server, serve_until_end)
