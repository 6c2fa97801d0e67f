"""
Measure what SPO samples: completions from places in others, and trees, against plain completions.

    python benchmarks/segments.py           # in process, on the testbed model
    python benchmarks/segments.py --vllm    # on a vLLM server that is started here

Plain sampling has 64 completions in flight, of as many prompts as give about the tokens of one tree. "values" are
four completions from each of four places of each plain completion of the first 64, all at once, as SPO-chain samples
them. "tree" is one tree of 6-6-6 segments of at most 30 tokens, with 64 in flight; "alone" is the number of tokens of
its leaves' completions if each were sampled by itself. Rounds are interleaved, and have their own seeds; the table
shows medians, and ratios are those of the seconds per token within each round. A first round does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pandas as pd
from truncated_rollout import make_prompts

from step_trl.rollout import DynamicTruncatedRollout, Rollout, SamplingParams, Segment, TreeRollout
from step_trl.rollout.engines import Engine, TransformersEngine, VLLMServer, VLLMServerEngine
from step_trl.testbed import MODEL_DIR, load_model, load_tokenizer


BRANCHING = (6, 6, 6)
PLACES, SAMPLES = 4, 4
SMALLEST = (  # for tests
    "--max-tokens", "16", "--rounds", "1", "--segment-tokens", "5", "--branching", "2", "2", "--in-flight", "2",
)  # fmt: skip


def values_of(rollouts: Sequence[Rollout], max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """
    Return the prompts and the budgets of the completions from evenly spaced places of others, the longest first, as
    SPO-chain asks for them.
    """
    found = []
    for rollout in rollouts:
        for place in range(1, PLACES + 1):
            cut = len(rollout.completion_ids) * place // (PLACES + 1)
            found += [([*rollout.prompt_ids, *rollout.completion_ids[:cut]], max_tokens - cut)] * SAMPLES
    found.sort(key=lambda asked: len(asked[0]), reverse=True)
    return [prompt for prompt, _ in found], [budget for _, budget in found]


def tokens_alone(tree: Sequence[Segment]) -> int:
    """Return the number of tokens of the completions of a tree, without sharing."""
    return sum(segment.start + len(segment.token_ids) for segment in tree if segment.is_leaf)


def measure(engine: Engine, number: int, args: argparse.Namespace) -> dict[str, float]:
    """Measure one round: the seconds and tokens of each kind."""
    sampling, tokenizer = SamplingParams(args.max_tokens), engine.tokenizer
    found: dict[str, float] = {}

    def timed(name: str, run: Callable[[], int]) -> None:
        began = time.perf_counter()
        found[f"{name} tokens"] = run()
        found[f"{name} seconds"] = time.perf_counter() - began

    tree = TreeRollout(engine, sampling, args.branching, args.segment_tokens, max_in_flight=args.in_flight)
    plain = DynamicTruncatedRollout(engine, [], sampling, max_in_flight=args.in_flight)
    (prompt,) = make_prompts(tokenizer, 1)
    segments: list[Segment] = []

    def grow() -> int:
        segments.extend(tree.run([prompt], [number])[0])
        return sum(len(segment.token_ids) for segment in segments)

    timed("tree", grow)
    found["tree alone"] = tokens_alone(segments)
    rollouts: list[Rollout] = []

    def sample() -> int:
        # Completions of the tree's prompt, so that lengths are alike.
        count = max(
            args.in_flight, round(found["tree tokens"] / (found["tree alone"] / sum(s.is_leaf for s in segments)))
        )
        rollouts.extend(plain.run([prompt] * count, [number * 10_000 + place for place in range(count)]))
        return sum(rollout.sampled_tokens for rollout in rollouts)

    timed("plain", sample)
    prompts, budgets = values_of(rollouts[: args.in_flight], args.max_tokens)

    def continue_all() -> int:
        seeds = [number * 100_000 + place for place in range(len(prompts))]
        return sum(rollout.sampled_tokens for rollout in plain.run(prompts, seeds, budgets=budgets))

    timed("values", continue_all)
    return found


def table(rounds: pd.DataFrame) -> pd.DataFrame:
    lines = {}
    for name in ("plain", "values", "tree"):
        seconds, tokens = rounds[f"{name} seconds"], rounds[f"{name} tokens"]
        per_token = (seconds / tokens) / (rounds["plain seconds"] / rounds["plain tokens"])
        alone = rounds["tree alone"] if name == "tree" else tokens
        lines[name] = {
            "seconds": f"{seconds.median():.2f}",
            "tokens": f"{tokens.median():.0f}",
            "alone": f"{alone.median():.0f}",
            "tokens/s": f"{(tokens / seconds).median():.0f}",
            "seconds per token /plain": f"{per_token.median():.3f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", action="store_true", help="sample on a vLLM server, which is started here")
    parser.add_argument("--url", help="URL of an idle server on the testbed model, in place of --vllm")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=224)
    parser.add_argument("--segment-tokens", type=int, default=30)
    parser.add_argument("--branching", type=int, nargs="+", default=BRANCHING)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    with ExitStack() as servers:
        engine: Engine
        if args.url or args.vllm:
            own = VLLMServer(MODEL_DIR, max_model_len=1024, log_file="/dev/null")
            engine = VLLMServerEngine(args.url or servers.enter_context(own).url, tokenizer)
        else:
            engine = TransformersEngine(load_model(), tokenizer)
        measured = [measure(engine, number, args) for number in range(args.rounds + 1)]
    print(table(pd.DataFrame(measured[1:])).to_string())


if __name__ == "__main__":
    main()
