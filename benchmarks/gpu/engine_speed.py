"""
Compare the tokens per second of the in-process engine and of `model.generate`, with the shapes of real models.

    python benchmarks/gpu/engine_speed.py
    python benchmarks/gpu/engine_speed.py --models 1.7B --batch-sizes 32 256 --max-tokens 512

As in `benchmarks/engine.py`, both sample as many tokens for the same prompts, at temperature 1 and without EOS, in
interleaved rounds after one that is not counted. Weights are random and in bfloat16. Ratios are computed within each
round; the table has medians.
"""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import make_prompts, measure, with_engine, with_generate

from gpu.block import SHAPES, TESTBED, Block, begin_peak, build_model, gib, make_parser, peak_memory
from step_trl import testbed


SMALLEST = ("--models", "toy", "--batch-sizes", "2", "--max-tokens", "4", "--rounds", "1")  # for tests


@lru_cache(maxsize=1)
def load(name: str) -> PreTrainedModel:
    return build_model(name, "bfloat16")


def compare(name: str, batch_size: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Return the medians of a batch size, and the peak of the memory of each contender."""
    model, tokenizer = load(name), testbed.load_tokenizer()
    contenders = {
        "generate": with_generate(model, max_tokens),
        "engine": with_engine(model, tokenizer, max_tokens, max_batch_size=batch_size),
    }
    prompts = make_prompts(tokenizer, batch_size)
    peaks = {}
    for contender, run in contenders.items():
        begin_peak()
        run(prompts)
        peaks[f"{contender}, peak GiB"] = gib(peak_memory())
    speeds = pd.DataFrame(measure(contenders, prompts, rounds))
    ratio = speeds["engine"].div(speeds["generate"])
    return {
        **{f"{contender}, tokens/s": float(speed) for contender, speed in speeds.median().items()},
        "ratio": float(ratio.median()),
        "lowest": float(ratio.min()),
        "highest": float(ratio.max()),
        **peaks,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, TESTBED], default=["0.6B", "1.7B"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each completion")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    block = Block("engine_speed", options, {"max_tokens": options.max_tokens, "rounds": options.rounds})

    for name in options.models:
        for size in options.batch_sizes:
            run = partial(compare, name, size, options.max_tokens, options.rounds)
            block.measure(f"{name}, batch {size}", run)
    block.finish()


if __name__ == "__main__":
    main()
