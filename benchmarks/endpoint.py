"""
Measure the endpoint with early exits: streams of chat completions through it, and from the vLLM server behind it.

    python benchmarks/endpoint.py                             # starts a server on the testbed model, and the endpoint
    python benchmarks/endpoint.py --url http://127.0.0.1:8000 --streams 16 64 --rounds 5

All contenders ask for the same conversations with the same seeds, as many at once as there are streams. "No exits" and
"probes only" sample the same tokens as the server. The endpoint is a separate process. Rounds are interleaved, so that
a busy machine slows all contenders equally. Each round has its own seeds, and a first round does not count. The table
shows medians. The ratios, with the lowest and the highest, are those of the seconds per token of the completions,
relative to the server's in the same round. "First text" is the median time until a stream has text. The CPU time is
the endpoint's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import pandas as pd
import psutil

from step_trl.report.tables import to_markdown
from step_trl.rollout.engines import VLLMServer
from step_trl.rollout.engines.vllm_process import free_port
from step_trl.testbed import MODEL_DIR, load_dataset


SMALLEST = ("--streams", "2", "--max-tokens", "24", "--rounds", "1")  # for tests
# Options of the endpoint's requests.
EXITS = {
    "endpoint, no exits": {"exit_confidence": None},
    "endpoint, probes only": {"exit_confidence": 1.0},
    "endpoint, exits": {"exit_confidence": 0.95},
}
SERVER = "vLLM server"


@dataclass
class Read:
    """What the client has read of one stream."""

    tokens: int = 0
    first_text: float = 0.0  # seconds
    exited: bool = False


async def read_stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Read:
    read, began, rest = Read(), time.perf_counter(), b""
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for data in response.content.iter_any():
            *events, rest = (rest + data).split(b"\n\n")
            for event in filter(lambda one: one.startswith(b"data: {"), events):
                chunk = json.loads(event[6:])
                if chunk.get("usage"):
                    read.tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    read.exited |= bool(choice.get("early_exit", {}).get("exited"))
                    if not read.first_text and any(choice["delta"].get(name) for name in ("reasoning", "content")):
                        read.first_text = time.perf_counter() - began
    return read


async def read_all(url: str, bodies: list[dict[str, Any]]) -> list[Read]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None)
    ) as session:
        return await asyncio.gather(*(read_stream(session, url, body) for body in bodies))


def measure(url: str, process: psutil.Process | None, bodies: list[dict[str, Any]]) -> dict[str, float]:
    def cpu() -> float:
        return 0.0 if process is None else sum(process.cpu_times()[:2])

    began, used = time.perf_counter(), cpu()
    read = asyncio.run(read_all(url, bodies))
    seconds, used = time.perf_counter() - began, cpu() - used
    tokens = sum(one.tokens for one in read)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "first text": statistics.median(one.first_text for one in read),
        "exits": statistics.mean(one.exited for one in read),
        "CPU": used / tokens,
    }


def bodies_of(
    model: str, streams: int, round_: int, max_tokens: int, further: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Return the requests of one round, for the server if there is nothing further."""
    conversations = load_dataset("train").select(range(streams))["prompt"]
    options = {"model": model, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    # The endpoint samples with the seeds of a rollout, which are those of the positions of its calls.
    factor = 1_000_003 if further is None else 1
    seeds = [(1000 * round_ + number) * factor for number in range(streams)]
    return [
        options | {"messages": messages, "seed": seed} | (further or {})
        for messages, seed in zip(conversations, seeds, strict=True)
    ]


def compare(server: str, endpoint: str, process: psutil.Process, streams: int, max_tokens: int, rounds: int) -> None:
    with urllib.request.urlopen(f"{server}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    contenders = {SERVER: partial(measure, server, None)}
    contenders |= {name: partial(measure, endpoint, process) for name in EXITS}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            measured[name].append(contender(bodies_of(model, streams, round_, max_tokens, EXITS.get(name))))
    runs = {name: pd.DataFrame(values[1:]) for name, values in measured.items()}
    per_token = {name: own["seconds"] / own["tokens"] for name, own in runs.items()}
    table = {}
    for name, own in runs.items():
        ratios, medians = per_token[name] / per_token[SERVER], own.median()
        table[name] = {
            "seconds": f"{medians['seconds']:.2f}",
            "tokens": f"{medians['tokens']:.0f}",
            "s per token / server": f"{ratios.median():.2f} ({ratios.min():.2f}-{ratios.max():.2f})",
            "exits": f"{medians['exits']:.2f}",
            "first text, ms": f"{1000 * medians['first text']:.0f}",
            "endpoint CPU, µs per token": "" if name == SERVER else f"{1e6 * medians['CPU']:.0f}",
        }
    print(f"\n{streams} streams, {rounds} rounds\n{to_markdown(pd.DataFrame.from_dict(table, orient='index'))}")


@contextmanager
def endpoint_before(url: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start the endpoint as a process of its own, and yield its URL."""
    port = free_port()
    command = [sys.executable, "-m", "step_trl", "serve", str(MODEL_DIR), "--port", str(port), "--urls", url]
    with subprocess.Popen([*command, "--exit-confidence", "0.95"], stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not is_healthy(f"http://127.0.0.1:{port}"):
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.terminate()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of a server on the testbed model; by default, this script starts one")
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with nullcontext() if args.url else VLLMServer(MODEL_DIR, max_model_len=1024, log_file="/dev/null") as server:
        url = args.url or server.url
        with endpoint_before(url) as (endpoint, process):
            for streams in args.streams:
                compare(url, endpoint, process, streams, args.max_tokens, args.rounds)


if __name__ == "__main__":
    main()
