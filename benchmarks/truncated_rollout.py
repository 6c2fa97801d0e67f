"""
Measure truncated rollouts on a vLLM server: the cost of probes, the savings of exits, and rounds in lock-step.

    python benchmarks/truncated_rollout.py                                 # starts a server on the testbed model
    python benchmarks/truncated_rollout.py --in-flight 16 64 --per-slot 4  # refills slots: like a large batch
    python benchmarks/truncated_rollout.py --url http://127.0.0.1:8000     # an idle `step-trl serve` of the model

All contenders sample the same prompts with the same seeds at temperature 1 (problems of the training split, eight
times each), and start from an empty prefix cache. Rounds are interleaved, so that a busy machine slows all of them
equally. Each round has its own seeds; the tables show medians, and ratios are computed within each round. A first
round does not count: in it, the completions of C1 are compared with those of C' and D, which make the same decisions.
B and C use one request for a whole thought, so their seeds give other completions, of the same distribution.

Sampled tokens are those that the server counted, including cancelled work up to the moment at which the server noticed
the cancellation; the forward pass that runs at that moment is not counted. "thought" are the sampled tokens in the
completions, including final answers; "probe" are the answers of probes, as far as they were read; "discarded" are the
rest: tokens sampled while a probe decided to stop, and tokens that the server sampled after a call had ended here.
"read" are tokens of prompts and completions that the server computed, because they were not in its prefix cache.

The testbed's steps are short. So the share of probes in the sampled tokens is also measured with steps of at least
`--step-tokens` tokens: before each trigger stand tokens that the model does not read, as if it had sampled them. A
probe that leads to an exit is the answer of its completion, so its tokens are no cost. The table has them, too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pandas as pd

from step_trl.rollout import (
    Boundary,
    ConfidenceTruncation,
    DynamicTruncatedRollout,
    Probe,
    ProbeRecord,
    Rollout,
    SamplingParams,
)
from step_trl.rollout.engines import Engine, Generation, VLLMServer, VLLMServerEngine
from step_trl.rollout.records import RolloutBuilder
from step_trl.rollout.truncation import GoOn, Outcome
from step_trl.steps import DelimiterSegmenter, TriggerSegmenter
from step_trl.testbed import MODEL_DIR, load_dataset, load_tokenizer
from step_trl.text import THINK_END


GROUP_SIZE = 8  # completions of one prompt
MOST_DIFFERENT = 0.05  # the share of differing completions that is allowed for C and D
NAMES = {
    "A": "A plain",
    "B": "B exits off, speculative",
    "C": "C exits on, speculative",
    "C1": "C1 the same, a request per segment",
    "C'": "C' exits on, pausing",
    "D": "D exits on, lock-step, full probes",
}
Contender = Callable[[Sequence[list[int]], Sequence[int]], list[Rollout]]  # prompts, seeds
SMALLEST = ("--in-flight", "2", "--per-slot", "1", "--max-tokens", "40", "--rounds", "1")  # for tests


@dataclass
class Paused:
    """A rollout of [`LockStepRollout`] that waits at a trigger."""

    rollout: RolloutBuilder
    seed: int
    boundary: Boundary
    probe: Probe


class LockStepRollout:
    """
    Samples in rounds, as DEER and the released code of Step-GRPO do.

    All running rollouts sample to their next trigger. When the last one has reached it, all are probed. When the last
    probe has ended, confident rollouts exit with their answers, and the others continue in the next round.
    """

    def __init__(self, engine: VLLMServerEngine, callback: ConfidenceTruncation, max_tokens: int, max_in_flight: int):
        self.max_in_flight = max_in_flight
        self.engine = engine
        self.callback = callback
        self.max_tokens = max_tokens
        self.triggers = TriggerSegmenter(engine.tokenizer, callback.triggers)
        self.think_end = DelimiterSegmenter(engine.tokenizer, THINK_END)

    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        rollouts = []
        for start in range(0, len(prompts), self.max_in_flight):
            batch = slice(start, start + self.max_in_flight)
            rollouts += asyncio.run(self._rounds(prompts[batch], seeds[batch]))
        return rollouts

    async def _rounds(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        rollouts = [RolloutBuilder(prompt) for prompt in prompts]
        running, unfinished = list(zip(rollouts, seeds)), []
        while running:
            stopped = await asyncio.gather(*(self._to_next_probe(rollout, seed) for rollout, seed in running))
            paused = [pause for pause in stopped if pause is not None]
            answers = await asyncio.gather(*(self._induce(pause.boundary, pause.probe) for pause in paused))
            running = []
            for pause, answer in zip(paused, answers):
                if not self._leaves(pause, answer):
                    running.append((pause.rollout, pause.seed))
                elif answer.finish_reason != "eos":
                    unfinished.append(pause.rollout)
        await asyncio.gather(*map(self._finish_answer, unfinished))
        return [rollout.build({}) for rollout in rollouts]

    async def _to_next_probe(self, rollout: RolloutBuilder, seed: int) -> Paused | None:
        """Sample to the next trigger of the open thought. Return `None` if the rollout has ended."""
        path, stop = rollout.completion_ids, self.callback.triggers
        while len(path) < self.max_tokens:
            segment = await self.engine.generate(
                [*rollout.prompt_ids, *path],
                max_tokens=self.max_tokens - len(path),
                stop=stop,
                seed=seed * 1_000_003 + len(path),  # as in DynamicTruncatedRollout
            )
            rollout.append(segment)
            rollout.sampled_tokens += len(segment.token_ids)
            if segment.finish_reason == "eos":
                break
            spans = self.triggers.occurrences(path)
            if self.think_end.boundaries(path):
                stop = ()
            elif spans and spans[-1][1] == len(path):
                remaining, probes = self.max_tokens - len(path), rollout.probes
                boundary = Boundary(rollout.prompt_ids, path, spans[-1][0], remaining, len(probes), probes)
                decision = self.callback.at_boundary(boundary)
                if isinstance(decision, Probe):
                    return Paused(rollout, seed, boundary, decision)
                if isinstance(decision, GoOn) and not decision.watch:
                    stop = ()
        return None

    async def _induce(self, boundary: Boundary, probe: Probe) -> Generation:
        return await self.engine.generate(
            [*boundary.prompt_ids, *boundary.path_ids, *probe.prompt_ids],
            max_tokens=probe.max_tokens,
            stop=probe.stop,
            temperature=0.0,
        )

    def _leaves(self, pause: Paused, answer: Generation) -> bool:
        rollout, tokens = pause.rollout, len(answer.token_ids)
        rollout.truncated = self.callback.after_probe(pause.boundary, pause.probe, answer) is not None
        outcome: Outcome = "exit" if rollout.truncated else "declined"
        confidence = self.callback.confidence(answer)
        rollout.probes.append(
            ProbeRecord(len(rollout.completion_ids), answer.token_ids, answer.logprobs, outcome, confidence)
        )
        rollout.sampled_tokens += tokens
        if rollout.truncated:
            rollout.inject(pause.probe.prompt_ids)
            rollout.append(answer, greedy=True)
        else:
            rollout.discarded_tokens += tokens
        return rollout.truncated

    async def _finish_answer(self, rollout: RolloutBuilder) -> None:
        """Continue an answer that is longer than its probe."""
        if (remaining := self.max_tokens - len(rollout.completion_ids)) > 0:
            path = [*rollout.prompt_ids, *rollout.completion_ids]
            answer = await self.engine.generate(path, max_tokens=remaining, temperature=0.0)
            rollout.append(answer, greedy=True)
            rollout.sampled_tokens += len(answer.token_ids)


class LongSteps(Engine):
    """The thoughts of a model with steps of at least `step_tokens` tokens. The model does not read what was added."""

    def __init__(self, engine: Engine, step_tokens: int):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.step_tokens = step_tokens
        self.added_id = engine.tokenizer.pad_token_id

    async def generate(self, prompt_ids: Sequence[int], *, max_tokens: int, **call: Any) -> Generation:
        read = [token_id for token_id in prompt_ids if token_id != self.added_id]
        room = self.tokenizer.model_max_length - len(read)
        found = await self.engine.generate(read, max_tokens=min(max_tokens, room), **call)
        if found.finish_reason == "length" and room < max_tokens:  # what fills the model's context ends
            return replace(found, finish_reason="eos")
        missing = self.step_tokens - len(found.token_ids)
        if found.finish_reason != "stop" or missing <= 0:  # a probe, an answer, or the end of a thought
            return found
        return Generation([self.added_id] * missing + found.token_ids, [0.0] * missing + found.logprobs, "stop")


def long_steps(url: str, rollouts: int, step_tokens: int) -> pd.DataFrame:
    """Return the tokens of probes in rollouts with long steps, with exits off and on."""
    tokenizer = load_tokenizer()
    engine, sampling = (
        LongSteps(VLLMServerEngine(url, tokenizer, sample_ahead=False), step_tokens),
        SamplingParams(16_384),
    )
    lines = {}
    for name, threshold in (("B exits off", 1.0), ("C exits on", ConfidenceTruncation.threshold)):
        callback = ConfidenceTruncation(tokenizer, threshold=threshold)
        rollout = DynamicTruncatedRollout(engine, [callback], sampling, speculative=False)
        found = rollout.run(make_prompts(tokenizer, rollouts), range(rollouts))
        probes = [probe for own in found for probe in own.probes]
        sampled = sum(own.sampled_tokens for own in found)
        declined = sum(len(probe.token_ids) for probe in probes if probe.outcome != "exit")
        of_all = sum(len(probe.token_ids) for probe in probes)
        lines[name] = {
            "rollouts": rollouts,
            "sampled": sampled,
            "probes": len(probes),
            "declined, tokens": declined,
            "declined, share": f"{declined / sampled:.2%}",
            "all, tokens": of_all,
            "all, share": f"{of_all / sampled:.2%}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


class Counter:
    """Reads how many tokens a server has sampled, and how many of prompts it has computed, without our calls."""

    def __init__(self, url: str):
        self.url = url
        self.client = httpx.Client(timeout=60, trust_env=False)
        self.own_calls = 0

    def counts(self) -> tuple[int, int]:
        lines = self.client.get(f"{self.url}/metrics").raise_for_status().text.splitlines()

        def total(name: str) -> int:
            return round(sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}_total{{")))

        read = total("prefix_cache_queries") - total("prefix_cache_hits")
        return total("generation_tokens") - self.own_calls, read - self.own_calls

    def settle(self) -> tuple[int, int]:
        """Wait until the server has ended cancelled requests: until a call of one token is all that it samples."""
        before, counts = None, self.counts()
        while counts != before:
            body = {"prompt": [0], "max_tokens": 1}
            self.client.post(f"{self.url}/v1/completions", json=body).raise_for_status()
            self.own_calls += 1
            before, counts = counts, self.counts()
        return counts

    def start_afresh(self) -> tuple[int, int]:
        """Wait for the server to settle, and clear its prefix cache."""
        counts = self.settle()
        self.client.post(f"{self.url}/reset_prefix_cache").raise_for_status()
        return counts


def quantities(seconds: float, sampled: int, read: int, rollouts: list[Rollout]) -> dict[str, float]:
    """Return what the tables show of one round of one contender."""
    probes = [probe for rollout in rollouts for probe in rollout.probes]
    probe_tokens = sum(len(probe.token_ids) for probe in probes)
    declined = [len(probe.token_ids) for probe in probes if probe.outcome != "exit"]
    # The sampled tokens in the completions, without the answers that were kept from probes.
    thought = sum(rollout.sampled_tokens - rollout.discarded_tokens for rollout in rollouts)
    thought -= probe_tokens - sum(declined)
    return {
        "seconds": seconds,
        "sampled": sampled,
        "thought": thought,
        "probe": probe_tokens,
        "discarded": sampled - thought - probe_tokens,
        "read": read,
        "tokens/s": sampled / seconds,
        "seconds per token": seconds / sampled,
        "probes": len(probes),
        "per declined": statistics.fmean(declined) if declined else float("nan"),
        # If no thought was discarded: with exits off, or without speculation.
        "server tokens per probe": (sampled - thought) / len(probes) if probes else float("nan"),
        "exits": statistics.fmean(rollout.truncated for rollout in rollouts),
        "kept": sum(len(rollout.completion_ids) for rollout in rollouts),
    }


def make_prompts(tokenizer, count: int) -> list[list[int]]:
    problems = load_dataset("train").select(range(-(-count // GROUP_SIZE)))["prompt"]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]
    return [prompts[index // GROUP_SIZE] for index in range(count)]


def make_contenders(url: str, max_tokens: int, max_in_flight: int, **probe: Any) -> dict[str, Contender]:
    tokenizer, sampling = load_tokenizer(), SamplingParams(max_tokens)
    ahead, per_segment = VLLMServerEngine(url, tokenizer), VLLMServerEngine(url, tokenizer, sample_ahead=False)
    on = ConfidenceTruncation(tokenizer, **probe)
    off = ConfidenceTruncation(tokenizer, threshold=1.0, **probe)
    full_probes = ConfidenceTruncation(tokenizer, early_rejection=False, **probe)

    def rollout(engine: VLLMServerEngine, *callbacks: ConfidenceTruncation, speculative: bool = True) -> Contender:
        return DynamicTruncatedRollout(engine, callbacks, sampling, speculative, max_in_flight=max_in_flight).run

    return {
        "A": rollout(ahead),
        "B": rollout(ahead, off),
        "C": rollout(ahead, on),
        "C1": rollout(per_segment, on),
        "C'": rollout(per_segment, on, speculative=False),
        "D": LockStepRollout(per_segment, full_probes, max_tokens, max_in_flight),
    }


def measure(
    contender: Contender, prompts: list[list[int]], counter: Counter, number: int = 0
) -> tuple[list[Rollout], dict[str, float]]:
    """Return the rollouts of one round, and its [`quantities`]."""
    seeds = range(number * len(prompts), (number + 1) * len(prompts))
    before, started = counter.start_afresh(), time.perf_counter()
    rollouts = contender(prompts, seeds)
    seconds = time.perf_counter() - started
    sampled, read = (after - earlier for after, earlier in zip(counter.settle(), before))
    return rollouts, quantities(seconds, sampled, read, rollouts)


def check_decisions(rollouts: dict[str, list[Rollout]]) -> None:
    """Check that C1, C' and D make the same completions, except for a few that another batch rounds differently."""
    count = len(rollouts["C1"])
    counts = {
        name: sum(a.completion_ids != b.completion_ids for a, b in zip(rollouts["C1"], rollouts[name], strict=True))
        for name in ("C'", "D")
    }
    told = ", ".join(f"{n} of {count} ({name})" for name, n in counts.items())
    print(f"Completions that differ from those of C1: {told}")
    assert max(counts.values()) <= MOST_DIFFERENT * count, "C1, C' and D do not make the same decisions"


def ratios(rows: dict[str, pd.DataFrame], own: str, other: str) -> pd.Series:
    """Return the medians of the ratios within each round."""
    return (rows[own] / rows[other]).median()


def table(rows: dict[str, pd.DataFrame]) -> pd.DataFrame:
    lines = {}
    for name, own in rows.items():
        line = own.median().drop(["seconds per token", "server tokens per probe"])
        digits = dict.fromkeys(line.index, 0) | {"seconds": 2, "per declined": 1, "exits": 2}
        to_plain = ratios(rows, name, "A")
        lines[NAMES[name]] = {column: f"{value:.{digits[column]}f}" for column, value in line.items()} | {
            "seconds /A": f"{to_plain['seconds']:.2f}",
            "tokens/s /A": f"{to_plain['tokens/s']:.3f}",
            "seconds per token /A": f"{to_plain['seconds per token']:.3f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def goals(rows: dict[str, pd.DataFrame]) -> dict[str, float]:
    medians = {name: own.median() for name, own in rows.items()}
    return {
        "B/A tokens/s >= 0.97": ratios(rows, "B", "A")["tokens/s"],
        "(wall C/wall A)/(sampled C/sampled A) <= 1.05": ratios(rows, "C", "A")["seconds per token"],
        "D/C wall >= 1.3": ratios(rows, "D", "C")["seconds"],
        "tokens per declined probe <= 4, exits on (C)": medians["C"]["per declined"],
        "tokens per declined probe <= 4, exits off (B)": medians["B"]["per declined"],
        "tokens per probe on the server, exits off (B)": medians["B"]["server tokens per probe"],
    }


def compare(url: str, counter: Counter, in_flight: int, args: argparse.Namespace) -> dict[str, float]:
    """Measure all contenders with this many rollouts in flight, and print their table. Return the goals."""
    probe = {name: getattr(args, name) for name in ("answer_prompt", "max_probe_tokens") if getattr(args, name)}
    contenders = make_contenders(url, args.max_tokens, in_flight, **probe)
    prompts = make_prompts(load_tokenizer(), in_flight * args.per_slot)
    print(f"\n{len(prompts)} rollouts, {in_flight} in flight, {args.rounds} rounds", flush=True)
    check_decisions({name: measure(run, prompts, counter)[0] for name, run in contenders.items()})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name, run in contenders.items():
            rounds[name].append(measure(run, prompts, counter, number + 1)[1])
    rows = {name: pd.DataFrame(own) for name, own in rounds.items()}
    print(table(rows).to_string(), flush=True)
    return goals(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of an idle server on the testbed model; by default, this script starts one")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--per-slot", type=int, default=1, help="number of rollouts for each one in flight")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--answer-prompt", help="answer prompt of the probes")
    parser.add_argument("--max-probe-tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-tokens", type=int, default=200, help="least length of a long step")
    parser.add_argument(
        "--threads", type=int, help="threads of the server that is started here; by default, one core is left free"
    )
    parser.add_argument("--max-num-seqs", type=int, help="maximum number of calls that the server runs at once")
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the server inherits it
    extra = ["--max-num-seqs", str(args.max_num_seqs)] if args.max_num_seqs else []
    own_server = VLLMServer(MODEL_DIR, max_model_len=1024, extra_arguments=extra, log_file="/dev/null")
    with nullcontext() if args.url else own_server:
        url = (args.url or own_server.url).rstrip("/")
        counter = Counter(url)
        measured = {in_flight: compare(url, counter, in_flight, args) for in_flight in args.in_flight}
        probes = long_steps(url, max(args.in_flight) * args.per_slot, args.step_tokens)
    print("\nGoals, by rollouts in flight")
    print(pd.DataFrame(measured).round(3).to_string())
    print(f"\nProbes, steps of at least {args.step_tokens} tokens")
    print(probes.to_string())


if __name__ == "__main__":
    main()
