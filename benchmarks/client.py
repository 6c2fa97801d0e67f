"""
Measure the client of a vLLM server: truncated rollouts with a server that answers immediately.

    python benchmarks/client.py                                    # 2,560 rollouts of 16,000 tokens, 40 steps each
    python benchmarks/client.py --rollouts 256 --steps 10 40 160   # the same tokens in an increasing number of steps

The server is a separate process without a model. It sends the pieces of a made-up thought as fast as they are read, in
the form in which vLLM streams them, and the first token of each probe, which is so improbable that every probe is
declined after it. So all time is the client's: requests, JSON, stop strings, bookkeeping. CPU time and peak memory are
those of a new process for each line. The longest callback is the longest time for which the event loop could do
nothing else, without Python's garbage collector, whose longest run has a separate column.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pandas as pd
from aiohttp import web

from step_trl.report.tables import to_markdown
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import VLLMServerEngine
from step_trl.testbed import load_tokenizer


PROMPT = [5, 6, 7]
PIECE = 16  # tokens
PIECES_PER_WRITE = 8
SMALLEST = ("--rollouts", "4", "--tokens", "200", "--steps", "4")  # for tests


def event(token_ids: list[int], logprob: float, finish_reason: str | None = None) -> bytes:
    """Return a piece as vLLM 0.31 sends it."""
    count = len(token_ids)
    logprobs = {
        "text_offset": list(range(count)),
        "token_logprobs": [logprob] * count,
        "tokens": [f"token_id:{token_id}" for token_id in token_ids],
        "top_logprobs": [{f"token_id:{token_id}": logprob} for token_id in token_ids],
    }
    choice = {
        "index": 0,
        "text": "w" * 4 * count,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": None,
        "prompt_token_ids": None,
        "token_ids": token_ids,
    }
    head = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1_700_000_000, "model": "m"}
    return b"data: " + json.dumps(head | {"choices": [choice], "usage": None}).encode() + b"\n\n"


def thought(tokens: int, steps: int, filler: int, trigger: int) -> list[bytes]:
    """Return the writes of a whole thought, with a trigger at the end of each step except the last."""
    pieces = -(-tokens // PIECE)
    ends = {round(pieces * step / steps) for step in range(1, steps)}
    plain, last_of_step = event([filler] * PIECE, -0.123456789), event([filler] * (PIECE - 1) + [trigger], -0.1)
    events = [last_of_step if piece in ends else plain for piece in range(1, pieces)]
    events.append(event([filler] * PIECE, -0.1, "length") + b"data: [DONE]\n\n")
    return [b"".join(events[i : i + PIECES_PER_WRITE]) for i in range(0, pieces, PIECES_PER_WRITE)]


def serve(pipe: Connection, writes: list[bytes], filler: int) -> None:
    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            if b'"temperature":0.0' in body:
                await response.write(event([filler], -5.0))
                await asyncio.sleep(3600)  # until the client disconnects
            for part in writes:
                await response.write(part)
        except (ConnectionError, asyncio.CancelledError):
            pass
        return response

    async def main() -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/completions", completions)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        pipe.send(runner.addresses[0][1])
        await asyncio.to_thread(pipe.recv)

    asyncio.run(main())


class Longest:
    """The longest callback of the event loop, and the longest garbage collection, in seconds."""

    callback = 0.0
    collection = 0.0

    def __enter__(self) -> Longest:
        self._run, self._collecting, self._began = asyncio.Handle._run, 0.0, 0.0
        asyncio.Handle._run = self._timed()  # type: ignore[method-assign]
        gc.callbacks.append(self._note_collection)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.Handle._run = self._run  # type: ignore[method-assign]
        gc.callbacks.remove(self._note_collection)

    def _timed(self) -> Callable[[asyncio.Handle], None]:
        run = self._run

        def timed(handle: asyncio.Handle) -> None:
            began, collecting = time.perf_counter(), self._collecting
            run(handle)
            seconds = time.perf_counter() - began - (self._collecting - collecting)
            self.callback = max(self.callback, seconds)

        return timed

    def _note_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
            return
        seconds = time.perf_counter() - self._began
        self._collecting += seconds
        self.collection = max(self.collection, seconds)


@contextmanager
def serving(tokens: int, steps: int) -> Iterator[int]:
    """A server in a separate process. Returns its port."""
    tokenizer = load_tokenizer()
    (trigger,) = tokenizer.encode("Wait", add_special_tokens=False)
    (filler,) = tokenizer.encode("+", add_special_tokens=False)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, thought(tokens, steps, filler, trigger), filler), daemon=True
    )
    server.start()
    try:
        yield here.recv()
    finally:
        server.terminate()


def measure(port: int, count: int, tokens: int, steps: int) -> dict[str, str]:
    """Measure one line in a separate process, for its peak memory."""
    tokenizer = load_tokenizer()
    engine = VLLMServerEngine(f"http://127.0.0.1:{port}", tokenizer, max_connections=4 * count)
    rollout = DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], SamplingParams(tokens))
    rollout.run([PROMPT])  # creates the tokenizer's tables, once
    memory, wall, cpu = peak_memory(), time.perf_counter(), time.process_time()
    with Longest() as longest:
        records = rollout.run([PROMPT] * count)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    kept = sum(len(record.completion_ids) for record in records)
    assert all(len(record.probes) == steps - 1 for record in records), "a trigger was missed"
    memory = peak_memory() - memory
    return {
        "rollouts": f"{count}",
        "tokens": f"{kept:,}",
        "steps each": f"{steps}",
        "seconds": f"{wall:.1f}",
        "client CPU, µs per token": f"{cpu / kept * 1e6:.2f}",
        "peak memory, GiB": f"{memory / 2**30:.2f}",
        "bytes per token": f"{memory / kept:.0f}",
        "longest callback, ms": f"{1000 * longest.callback:.0f}",
        "longest garbage collection, ms": f"{1000 * longest.collection:.0f}",
    }


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[2560])
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--steps", type=int, nargs="+", default=[40])
    args = parser.parse_args()
    rows = []
    for count in args.rollouts:
        for steps in args.steps:
            new_process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            with serving(args.tokens, steps) as port, new_process as process:
                rows.append(process.submit(measure, port, count, args.tokens, steps).result())
    print(to_markdown(pd.DataFrame(rows).set_index("rollouts")))


if __name__ == "__main__":
    main()
