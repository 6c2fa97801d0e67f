"""
Compare segmentation, rewards and selection on one core with plain Python in the same run.

    python benchmarks/bookkeeping.py [--rows 128] [--tokens 4096] [--repeats 5]

The batch imitates the text of a reasoning model (steps of about 25 tokens, some opened by a trigger), tokenized by a
byte-level BPE that is trained here. Padding does not count in tokens/s. Times are the best of the repeats; results are
compared before anything is timed.
"""

from __future__ import annotations

import argparse
import bisect
import math
import random
import re
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from step_trl.advantages import select_step_advantages
from step_trl.report.tables import to_markdown
from step_trl.rewards import step_efficiency_reward
from step_trl.steps import DelimiterSegmenter, TriggerSegmenter, token_bytes


NUM_GENERATIONS = 8
WHOLE_WORD = re.compile("(?<![A-Za-z])(?:Wait|Alternatively)(?![A-Za-z])")
BLANK_LINE = re.compile("\n\n")
SMALLEST = ("--rows", "8", "--tokens", "64", "--repeats", "1")  # for tests


@dataclass
class Batch:
    """The token ids, mask, step ids and log-probabilities `(B, T)`, and the correctness and advantages `(B,)`."""

    token_ids: torch.Tensor
    mask: torch.Tensor
    step_ids: torch.Tensor
    token_logps: torch.Tensor
    correct: torch.Tensor
    advantages: torch.Tensor


def write_text(rng: random.Random, steps: int) -> str:
    openings = ["So", "Then", "First,", "Next, we see that", "This means", "Wait,", "Wait, no.", "Alternatively,"]
    words = "add the numbers and subtract what is left over since waiting for a total gives the same sum again".split()
    text = ""
    for _ in range(steps):
        middle = " ".join(rng.choice(words) for _ in range(rng.randint(8, 20)))
        text += f"{rng.choice(openings)} {middle} {rng.randint(2, 99)} + {rng.randint(2, 99)}.\n\n"
    return text


def build_tokenizer(rng: random.Random) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    # as in Qwen and Llama 3: words include the space before them, punctuation the newlines after it
    words = pre_tokenizers.Split(Regex(" ?[A-Za-z]+| ?[0-9]+| ?[^ A-Za-z0-9\n]+\n*|\n+| +"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([write_text(rng, 2_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build_batch(tokenizer: PreTrainedTokenizerBase, rows: int, tokens: int, rng: random.Random) -> Batch:
    texts = [write_text(rng, tokens // 12) for _ in range(rows)]
    token_ids = torch.tensor([ids[:tokens] for ids in tokenizer(texts)["input_ids"]])
    torch.manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1))
    mask = (torch.arange(tokens) < lengths).long()
    return Batch(
        token_ids=token_ids,
        mask=mask,
        step_ids=DelimiterSegmenter(tokenizer).step_ids(token_ids, mask),
        token_logps=-torch.rand(rows, tokens, dtype=torch.float64),
        correct=torch.rand(rows) < 0.5,
        advantages=torch.randn(rows),
    )


# The plain references: the obvious implementations.


def plain_matches(pieces: list[str], ids: list[int], mask: list[int], pattern: re.Pattern) -> tuple[list, list]:
    kept = [pieces[index] if keep else "" for index, keep in zip(ids, mask)]
    ends, total = [], 0
    for piece in kept:
        total += len(piece)
        ends.append(total)
    return [match.end() - 1 for match in pattern.finditer("".join(kept))], ends


def plain_step_ids(pieces: list[str], batch: Batch, pattern: re.Pattern) -> list[list[int]]:
    result = []
    for ids, mask in zip(batch.token_ids.tolist(), batch.mask.tolist()):
        matches, ends = plain_matches(pieces, ids, mask, pattern)
        closing = {bisect.bisect_right(ends, position) for position in matches}
        row, step = [], 0
        for token, keep in enumerate(mask):
            row.append(step if keep else -1)
            step += token in closing
        result.append(row)
    return result


def plain_counts(pieces: list[str], batch: Batch) -> list[int]:
    rows = zip(batch.token_ids.tolist(), batch.mask.tolist())
    return [len(plain_matches(pieces, ids, mask, WHOLE_WORD)[0]) for ids, mask in rows]


def plain_reward(num_steps: torch.Tensor, correct: torch.Tensor) -> list[float]:
    steps, right, rewards = num_steps.tolist(), correct.tolist(), []
    for start in range(0, len(steps), NUM_GENERATIONS):
        group = range(start, min(start + NUM_GENERATIONS, len(steps)))
        counted = [steps[i] for i in group if right[i]]
        for i in group:
            mean = sum(counted) / len(counted) if counted else None
            rewards.append(-0.5 * math.tanh((steps[i] - mean) / mean) if mean and right[i] else 0.0)
    return rewards


def plain_selection(batch: Batch, granularity: str) -> list[list[float]]:
    result = []
    columns = (batch.step_ids, batch.token_logps, batch.correct, batch.advantages)
    for steps, logps, right, advantage in zip(*(column.tolist() for column in columns)):
        values: dict[int, list[float]] = {}
        for token, (step, logp) in enumerate(zip(steps, logps)):
            if step >= 0:
                values.setdefault(token if granularity == "token" else step, []).append(logp)
        order = sorted(values, key=lambda step: sum(values[step]) / len(values[step]))
        number = math.ceil(round((0.3 if right else 0.7) * len(order), 9))
        chosen = set(order[:number] if right else order[len(order) - number :])
        value = 0.0 if right else 1.0
        owners = range(len(steps)) if granularity == "token" else steps
        result.append([value if owner in chosen else advantage for owner in owners])
    return result


def comparisons(tokenizer: PreTrainedTokenizerBase, batch: Batch) -> list[tuple[str, Callable, Callable]]:
    """Return the name, our function and the plain function of each line of the table."""
    pieces = [piece.decode(errors="replace") for piece in token_bytes(tokenizer)]
    triggers, delimiters = TriggerSegmenter(tokenizer), DelimiterSegmenter(tokenizer)
    ended = DelimiterSegmenter(tokenizer, end_text="</think>")  # not in the batch: equal results, one more search
    ids, mask, correct = batch.token_ids, batch.mask, batch.correct
    num_steps = 1 + triggers.counts(ids, mask)
    selected = (batch.advantages, batch.token_logps, batch.step_ids, correct)
    plain_steps = partial(plain_step_ids, pieces, batch)
    return [
        ("triggers: counts", partial(triggers.counts, ids, mask), partial(plain_counts, pieces, batch)),
        ("triggers: step_ids", partial(triggers.step_ids, ids, mask), partial(plain_steps, WHOLE_WORD)),
        ("blank lines: step_ids", partial(delimiters.step_ids, ids, mask), partial(plain_steps, BLANK_LINE)),
        ("the same, end_text", partial(ended.step_ids, ids, mask), partial(plain_steps, BLANK_LINE)),
        (
            "efficiency reward",
            partial(step_efficiency_reward, num_steps, correct, NUM_GENERATIONS),
            partial(plain_reward, num_steps, correct),
        ),
        ("selection: steps", partial(select_step_advantages, *selected), partial(plain_selection, batch, "step")),
        (
            "selection: tokens",
            partial(select_step_advantages, *selected, granularity="token"),
            partial(plain_selection, batch, "token"),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="number of completions, a multiple of 8")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each row, including padding")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    tokenizer = build_tokenizer(rng)
    batch = build_batch(tokenizer, args.rows, args.tokens, rng)

    size = int(batch.mask.sum())
    steps = (batch.step_ids.amax(dim=1) + 1).double().mean()
    print(f"{args.rows} x {args.tokens} tokens, {size / batch.mask.numel():.0%} of them text, {steps:.0f} steps a row")
    rows = {}
    for name, ours, plain in comparisons(tokenizer, batch):
        torch.testing.assert_close(ours(), torch.tensor(plain()), check_dtype=False)
        fast, slow = (min(timeit.repeat(way, number=1, repeat=args.repeats)) for way in (ours, plain))
        rows[name] = {
            "ms": f"{fast * 1e3:.2f}",
            "M tokens/s": f"{size / fast / 1e6:.1f}",
            "plain ms": f"{slow * 1e3:.2f}",
            "plain M tokens/s": f"{size / slow / 1e6:.1f}",
            "ratio": f"{slow / fast:.1f}",
        }
    print(f"\n{to_markdown(pd.DataFrame.from_dict(rows, orient='index'))}")


if __name__ == "__main__":
    main()
