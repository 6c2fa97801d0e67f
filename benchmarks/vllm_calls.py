"""
Measure calls of the vLLM server engine, depending on how tokens arrive and on who looks for the stop strings.

    python benchmarks/vllm_calls.py                             # starts a server on the testbed model
    python benchmarks/vllm_calls.py --url http://127.0.0.1:8000 --calls 16 64 --rounds 3

All contenders sample the same rollouts (the same seeds): calls that end at "Wait" or "Alternatively", each continuing
the previous one, until EOS or `--max-tokens`. Rounds are interleaved, so that a busy machine slows all of them
equally; the table shows medians. CPU time is that of this process: the server's own cost shows only in the wall time.

A second table streams the same calls one token at a time with two HTTP clients, without the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext

import aiohttp
import httpx
import pandas as pd

from step_trl.report.tables import to_markdown
from step_trl.rollout.engines import Generation, VLLMServer, VLLMServerEngine
from step_trl.rollout.engines.stop_strings import StopStrings
from step_trl.testbed import MODEL_DIR, load_dataset, load_tokenizer
from step_trl.text import TRIGGERS


Sampler = Callable[[list[int], int, int], Awaitable[Generation]]  # tokens so far, maximum number of tokens, seed
SMALLEST = ("--calls", "2", "--max-tokens", "16", "--rounds", "1")  # for tests


def found_there(url: str, tokenizer, interval: int | None = None) -> Sampler:
    """
    Call the server with stop strings, as the engine does.

    With an interval, answers are streamed, as they are with an abandon rule, which never applies here.
    """
    engine = VLLMServerEngine(url, tokenizer, **{} if interval is None else {"stream_interval": interval})
    abandon = None if interval is None else lambda token_ids, logprobs: False

    async def sample(path: list[int], max_tokens: int, seed: int) -> Generation:
        return await engine.generate(path, max_tokens=max_tokens, stop=TRIGGERS, seed=seed, abandon=abandon)

    return sample


def found_here(url: str, tokenizer, interval: int) -> Sampler:
    """Call the server without stop strings, and close the stream once one has arrived."""
    engine = VLLMServerEngine(url, tokenizer, stream_interval=interval)
    stops = StopStrings(tokenizer, len(tokenizer) + 1)
    index = stops.index(TRIGGERS)

    async def sample(path: list[int], max_tokens: int, seed: int) -> Generation:
        seen, end = 0, None

        def complete(token_ids, logprobs) -> bool:
            nonlocal seen, end
            end, seen = stops.first_completed(index, token_ids, seen), len(token_ids)
            return end is not None

        generation = await engine.generate(path, max_tokens=max_tokens, seed=seed, abandon=complete)
        if end is None:  # the rule did not see the last piece
            end = stops.first_completed(index, generation.token_ids, seen)
        if end is None:
            return generation
        return Generation(generation.token_ids[:end], generation.logprobs[:end], "stop")

    return sample


async def roll_out(sample: Sampler, prompt: list[int], max_tokens: int, seed: int) -> int:
    path = list(prompt)
    while (left := max_tokens + len(prompt) - len(path)) > 0:
        generation = await sample(path, left, seed * 1_000_003 + len(path))
        path += generation.token_ids
        if generation.finish_reason == "eos":
            break
    return len(path) - len(prompt)


def timed(work: Callable[[], Awaitable[int]]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = asyncio.run(work())
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": seconds, "tokens": tokens, "tokens/s": tokens / seconds, "CPU": cpu / tokens * 1e6}


def body_of(prompt: list[int], max_tokens: int, seed: int) -> bytes:
    body = {"prompt": prompt, "max_tokens": max_tokens, "seed": seed, "stream": True, "logprobs": 0}
    return json.dumps(body | {"return_token_ids": True, "return_tokens_as_token_ids": True}).encode()


async def count_tokens(pieces: AsyncIterator[bytes]) -> int:
    rest, tokens = b"", 0
    async for data in pieces:
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                tokens += len(json.loads(event[6:])["choices"][0]["token_ids"])
    return tokens


def with_aiohttp(url: str, prompts: list[list[int]], max_tokens: int) -> Callable[[], Awaitable[int]]:
    async def work() -> int:
        async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session:

            async def one(prompt: list[int], seed: int) -> int:
                async with session.post(f"{url}/v1/completions", data=body_of(prompt, max_tokens, seed)) as response:
                    return await count_tokens(response.content.iter_any())

            return sum(await asyncio.gather(*(one(prompt, seed) for seed, prompt in enumerate(prompts))))

    return work


def with_httpx(url: str, prompts: list[list[int]], max_tokens: int) -> Callable[[], Awaitable[int]]:
    async def work() -> int:
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(headers=headers, timeout=None, trust_env=False) as client:

            async def one(prompt: list[int], seed: int) -> int:
                content = body_of(prompt, max_tokens, seed)
                async with client.stream("POST", f"{url}/v1/completions", content=content) as response:
                    return await count_tokens(response.aiter_raw())

            return sum(await asyncio.gather(*(one(prompt, seed) for seed, prompt in enumerate(prompts))))

    return work


def print_table(title: str, contenders: dict[str, Callable[[], Awaitable[int]]], rounds: int) -> None:
    """
    Measure all contenders, after one uncounted round, and print their table.

    Ratios of wall time are relative to the first contender, within each round.
    """
    measured = [{name: timed(work) for name, work in contenders.items()} for _ in range(rounds + 1)]
    runs = {name: pd.DataFrame([one[name] for one in measured[1:]]) for name in contenders}
    reference = next(iter(runs.values()))["seconds"]
    table = {}
    for name, own in runs.items():
        medians = own.median()
        table[name] = {
            "seconds": f"{medians['seconds']:.2f}",
            "ratio": f"{(own['seconds'] / reference).median():.2f}",
            "tokens": f"{own['tokens'].iloc[-1]:.0f}",
            "tokens/s": f"{medians['tokens/s']:.0f}",
            "client CPU, µs per token": f"{medians['CPU']:.0f}",
        }
    print(f"\n{title}\n{to_markdown(pd.DataFrame.from_dict(table, orient='index'))}")


def compare(url: str, tokenizer, calls: int, max_tokens: int, rounds: int) -> None:
    problems = load_dataset("train").select(range(calls))["prompt"]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]

    def work(sample: Sampler) -> Callable[[], Awaitable[int]]:
        async def roll_out_all() -> int:
            rollouts = (roll_out(sample, prompt, max_tokens, seed) for seed, prompt in enumerate(prompts))
            return sum(await asyncio.gather(*rollouts))

        return roll_out_all

    samplers = {"one answer, the server finds the stop": found_there(url, tokenizer)}
    for interval in (1, 4, 16):
        samplers[f"streamed by {interval}, the server finds the stop"] = found_there(url, tokenizer, interval)
    samplers["streamed by 4, the stop is found here"] = found_here(url, tokenizer, interval=4)
    contenders = {name: work(sample) for name, sample in samplers.items()}
    print_table(f"{calls} rollouts, {rounds} rounds", contenders, rounds)
    clients = {"aiohttp": with_aiohttp(url, prompts, max_tokens), "httpx": with_httpx(url, prompts, max_tokens)}
    print_table(f"{calls} plain streams, {rounds} rounds", clients, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of a server on the testbed model; by default, this script starts one")
    parser.add_argument("--calls", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    with nullcontext() if args.url else VLLMServer(MODEL_DIR, max_model_len=1024, log_file="/dev/null") as server:
        for calls in args.calls:
            compare(args.url or server.url, tokenizer, calls, args.max_tokens, args.rounds)


if __name__ == "__main__":
    main()
