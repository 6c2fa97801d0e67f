"""
Compare truncated rollouts on a colocated vLLM model with those on a server.

    python benchmarks/colocated.py --rollouts 16 64

`step-trl serve` starts the server on the testbed model. The colocated model is the same model with the same options,
in this process. One is idle while the other works. Rounds are interleaved, and all contenders sample the same prompts.
The table shows medians, and ratios to the server's plain rollouts within each round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import pandas as pd

from step_trl.report.tables import to_markdown
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, Rollout, SamplingParams
from step_trl.rollout.engines import Engine, VLLMColocatedEngine, VLLMServer, VLLMServerEngine
from step_trl.testbed import MODEL_DIR, load_dataset, load_tokenizer


GROUP_SIZE = 8  # completions of one prompt
Contender = Callable[[list[list[int]]], list[Rollout]]
SMALLEST = ("--rollouts", "2", "--max-tokens", "40", "--rounds", "1")  # for tests


def load_colocated() -> VLLMColocatedEngine:
    """Load the colocated model with the options that `step-trl serve` gives a server on a CPU."""
    options = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= options | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    llm = LLM(
        str(MODEL_DIR),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=512,
        max_num_batched_tokens=32768,
        block_size=32,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
    )
    return VLLMColocatedEngine(llm, load_tokenizer())


def make_contenders(engines: dict[str, Engine], max_tokens: int) -> dict[str, Contender]:
    tokenizer, sampling = load_tokenizer(), SamplingParams(max_tokens)
    on = ConfidenceTruncation(tokenizer)
    contenders: dict[str, Contender] = {}
    for name, engine in engines.items():
        contenders[f"{name}, plain"] = DynamicTruncatedRollout(engine, [], sampling).run
        contenders[f"{name}, exits on, speculative"] = DynamicTruncatedRollout(engine, [on], sampling).run
        contenders[f"{name}, exits on, pausing"] = DynamicTruncatedRollout(engine, [on], sampling, False).run
    return contenders


def measure(contender: Contender, prompts: list[list[int]]) -> dict[str, float]:
    started = time.perf_counter()
    rollouts = contender(prompts)
    seconds = time.perf_counter() - started
    tokens = sum(rollout.sampled_tokens for rollout in rollouts)
    exits = statistics.fmean(rollout.truncated for rollout in rollouts)
    return {"seconds": seconds, "tokens/s": tokens / seconds, "exits": exits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of an idle server on the testbed model; by default, this script starts one")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    own_server = VLLMServer(
        MODEL_DIR, max_model_len=1024, extra_arguments=["--max-num-seqs", "512"], log_file="/dev/null"
    )
    with nullcontext() if args.url else own_server:
        url = args.url or own_server.url
        engines = {"server": VLLMServerEngine(url, tokenizer), "colocated": load_colocated()}
        contenders = make_contenders(engines, args.max_tokens)
        for count in args.rollouts:
            problems = load_dataset("train").select(range(-(-count // GROUP_SIZE)))["prompt"]
            chats = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]
            prompts = [chats[index // GROUP_SIZE] for index in range(count)]
            rounds = [
                {name: measure(contender, prompts) for name, contender in contenders.items()}
                for _ in range(args.rounds + 1)
            ]
            # The first round is a warm-up.
            rows = {name: pd.DataFrame([one[name] for one in rounds[1:]]) for name in contenders}
            table = {}
            for name, own in rows.items():
                medians, ratio = own.median(), (own["seconds"] / rows["server, plain"]["seconds"]).median()
                table[name] = {
                    "seconds": f"{medians['seconds']:.2f}",
                    "seconds / server, plain": f"{ratio:.2f}",
                    "tokens/s": f"{medians['tokens/s']:.0f}",
                    "exits": f"{medians['exits']:.2f}",
                }
            print(f"\n{count} rollouts\n\n{to_markdown(pd.DataFrame.from_dict(table, orient='index'))}")


if __name__ == "__main__":
    main()
