"""
Compare the tokens per second of the in-process engine with transformers' own two ways to generate.

    python benchmarks/engine.py                       # the testbed model
    python benchmarks/engine.py --model DIR --batch-sizes 32 64 --rounds 5 --threads 1

All contenders sample the same number of tokens for the same prompts, at temperature 1, without filters and without
EOS. Rounds are interleaved, so that a busy machine slows all of them equally; the table shows medians.

A second table shows truncated rollouts on the engine, on the testbed's problems and to their natural end: probes and
exits on and off, pausing and speculative, with and without early rejection, all with the same seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from step_trl.report.tables import to_markdown
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import TransformersEngine
from step_trl.rollout.engines.grouped_attention import reading_shared_keys_once
from step_trl.testbed import MODEL_DIR, load_dataset


Contender = Callable[[list[list[int]]], int]  # samples completions of the prompts and returns the number of tokens
SMALLEST = (
    *("--model", str(MODEL_DIR), "--batch-sizes", "2", "--max-tokens", "8", "--rollout-tokens", "40"),
    *("--rounds", "1"),
)  # for tests


def make_prompts(tokenizer, count: int) -> list[list[int]]:
    """Return prompts of different lengths."""
    sums = [" + ".join(str((7 * i + 13 * j) % 90 + 10) for j in range(2 + i % 6)) for i in range(count)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Calculate {text}."}], add_generation_prompt=True, return_dict=False
        )
        for text in sums
    ]


def left_padded(prompts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return prompts as arguments of `generate`."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
    }


def with_generate(model, max_tokens: int, attention: Callable[[], AbstractContextManager] = nullcontext) -> Contender:
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max_tokens, pad_token_id=0)

    def run(prompts: list[list[int]]) -> int:
        inputs = left_padded(prompts, model.device)
        with torch.no_grad(), attention():
            output = model.generate(**inputs, generation_config=config)
        return output[:, inputs["input_ids"].size(1) :].cpu().numel()  # a GPU is done when its tokens are here

    return run


def with_generate_batch(model, max_tokens: int, batch_size: int) -> Contender:
    model = copy.deepcopy(model)  # generate_batch changes its attention implementation
    model.generation_config = GenerationConfig(pad_token_id=0)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=-1)
    batching = ContinuousBatchingConfig(
        num_blocks=8 * batch_size, max_batch_tokens=256, block_size=32, use_async_batching=False
    )

    def run(prompts: list[list[int]]) -> int:
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return run


def with_engine(
    model, tokenizer, max_tokens: int, call_tokens: int | None = None, max_batch_size: int = 128
) -> Contender:
    """Sample in one call per prompt, or in calls of `call_tokens` tokens, each of which continues the previous one."""
    engine = TransformersEngine(model, tokenizer, max_batch_size, eos_token_ids=())

    async def complete(prompt: list[int]) -> int:
        path = list(prompt)
        while (left := max_tokens + len(prompt) - len(path)) > 0:
            generation = await engine.generate(path, max_tokens=min(left, call_tokens or left))
            path += generation.token_ids
        return len(path) - len(prompt)

    async def complete_all(prompts: list[list[int]]) -> int:
        return sum(await asyncio.gather(*map(complete, prompts)))

    def run(prompts: list[list[int]]) -> int:
        engine.drop_prefix_cache()
        return asyncio.run(complete_all(prompts))

    return run


def measure(contenders: dict[str, Contender], prompts: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Return the tokens per second of each contender in each round, after one uncounted round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            tokens = run(prompts)
            if index:
                speeds[name].append(tokens / (time.perf_counter() - started))
    return speeds


def compare_engines(model, tokenizer, batch_size: int, max_tokens: int, rounds: int) -> None:
    contenders = {
        "model.generate": with_generate(model, max_tokens),
        "model.generate_batch": with_generate_batch(model, max_tokens, batch_size),
        # As trainers call it. It only differs with grouped-query attention.
        "model.generate, shared keys read once": with_generate(model, max_tokens, reading_shared_keys_once),
        "TransformersEngine": with_engine(model, tokenizer, max_tokens),
        "TransformersEngine, calls of 16 tokens": with_engine(model, tokenizer, max_tokens, call_tokens=16),
    }
    speeds = pd.DataFrame(measure(contenders, make_prompts(tokenizer, batch_size), rounds))
    table = pd.DataFrame(
        {
            "tokens/s": speeds.median().map("{:.0f}".format),
            "range": speeds.min().map("{:.0f}".format) + "-" + speeds.max().map("{:.0f}".format),
            # Within each round, then the median.
            "ratio": speeds.div(speeds["model.generate"], axis=0).median().map("{:.2f}".format),
        }
    )
    print(f"\nBatch {batch_size}, {max_tokens} tokens each, {rounds} rounds")
    print(to_markdown(table.rename_axis("contender")))


def compare_rollouts(model, tokenizer, count: int, max_tokens: int, rounds: int) -> None:
    """Print the wall time and tokens of `count` rollouts. With a threshold of 1, every probe is declined."""
    engine = TransformersEngine(model, tokenizer)
    problems = load_dataset("train").select(range(count))["prompt"]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]

    def rollout(speculative: bool = False, **options) -> DynamicTruncatedRollout:
        callbacks = [ConfidenceTruncation(tokenizer, **options)] if options else []
        return DynamicTruncatedRollout(engine, callbacks, SamplingParams(max_tokens), speculative)

    contenders = {
        "no probes": rollout(),
        "exits off, pausing, full probes": rollout(threshold=1.0, early_rejection=False),
        "exits off, pausing, early rejection": rollout(threshold=1.0, early_rejection=True),
        "exits off, speculative, early rejection": rollout(True, threshold=1.0, early_rejection=True),
        "exits on, pausing, full probes": rollout(threshold=0.95, early_rejection=False),
        "exits on, pausing, early rejection": rollout(threshold=0.95, early_rejection=True),
        "exits on, speculative, early rejection": rollout(True, threshold=0.95, early_rejection=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rows = {}
    for index in range(rounds + 1):
        for name, contender in contenders.items():
            engine.drop_prefix_cache()
            before, started = copy.copy(engine.stats), time.perf_counter()
            records = contender.run(prompts, seeds=range(count))
            if index:
                seconds[name].append(time.perf_counter() - started)
            declined = [len(p.token_ids) for r in records for p in r.probes if p.outcome != "exit"]
            rows[name] = {
                "forwards": str(engine.stats.forwards - before.forwards),
                "sampled": str(engine.stats.sampled_tokens - before.sampled_tokens),
                "kept": str(sum(len(r.completion_ids) for r in records)),
                "exits": f"{sum(r.truncated for r in records) / count:.2f}",
                "tokens/declined probe": f"{statistics.fmean(declined) if declined else float('nan'):.1f}",
            }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("rollout")
    walls = pd.DataFrame(seconds)
    table.insert(0, "seconds", walls.median().map("{:.2f}".format))
    table.insert(1, "ratio", walls.div(walls["no probes"], axis=0).median().map("{:.2f}".format))
    print(f"\n{count} rollouts, {rounds} rounds\n{to_markdown(table)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_DIR, help="folder with a model and its tokenizer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--rollout-tokens", type=int, default=512, help="maximum tokens of a truncated rollout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="number of torch threads; on a busy machine, fewer than cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}, {torch.get_num_threads()} threads")
    for batch_size in args.batch_sizes:
        compare_engines(model, tokenizer, batch_size, args.max_tokens, args.rounds)
    compare_rollouts(model, tokenizer, max(args.batch_sizes), args.rollout_tokens, args.rounds)


if __name__ == "__main__":
    main()
