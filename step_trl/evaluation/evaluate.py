"""Sample a model on benchmarks and grade its answers: one tidy row per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..rewards import math_accuracy_reward
from ..rollout import DynamicTruncatedRollout, Rollout, SamplingParams, TruncationCallback
from ..rollout.engines import TransformersEngine
from ..steps import TriggerSegmenter
from .metrics import accuracy_efficiency_score, compression_rate


if TYPE_CHECKING:
    from datasets import Dataset


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Mapping[str, Dataset],
    *,
    n: int = 1,
    sampling: SamplingParams,
    callbacks: Sequence[TruncationCallback] = (),
    triggers: Sequence[str] = ("Wait", "Alternatively"),
    seed: int = 0,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """
    Sample `n` completions of each problem and grade them with math-verify.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        benchmarks (`Mapping[str, Dataset]`):
            Name to rows with `prompt` (messages) and `solution`.
        n (`int`, *optional*, defaults to `1`):
            Samples per problem.
        sampling ([`SamplingParams`]):
            Budget and sampling.
        callbacks (`Sequence[TruncationCallback]`, *optional*):
            Truncate completions at inference time, as [`~step_trl.rollout.ConfidenceTruncation`] does (DEER).
        triggers (`Sequence[str]`, *optional*):
            Words that open a semantic step, for the column `steps`.
        seed (`int`, *optional*, defaults to `0`):
            Of the sampling. A sample's seed depends on its place, so that two models are compared on the same draws.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions under way at once.
        on_batch (`Callable[[int, int], None]`, *optional*):
            Told the number of completions and of sampled tokens of each finished batch.

    Returns:
        [`~pandas.DataFrame`]: `benchmark`, `problem`, `sample`, `correct` (bool), `tokens`, `steps`, `truncated`
        (bool), `finished` (bool: ended with EOS), `completion` (text).
    """
    rollout = DynamicTruncatedRollout(TransformersEngine(model, tokenizer), callbacks, sampling, speculative=False)
    segmenter = TriggerSegmenter(tokenizer, triggers)
    jobs = [
        (name, problem, sample, row)
        for name, dataset in benchmarks.items()
        for problem, row in enumerate(dataset)
        for sample in range(n)
    ]
    rows = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        prompts = cast(
            "list[list[int]]",
            tokenizer.apply_chat_template(
                [row["prompt"] for *_, row in batch], add_generation_prompt=True, return_dict=False
            ),
        )
        seeds = [seed * 2**32 + start + place for place in range(len(batch))]
        rollouts = rollout.run(prompts, seeds)
        rows += _grade(batch, rollouts, tokenizer, segmenter)
        if on_batch is not None:
            on_batch(len(rollouts), sum(record.sampled_tokens for record in rollouts))
    return pd.DataFrame(rows)


def _grade(
    jobs: Sequence[tuple[str, int, int, dict]],
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    segmenter: TriggerSegmenter,
) -> list[dict]:
    texts = tokenizer.batch_decode([record.completion_ids for record in rollouts], skip_special_tokens=True)
    correct = math_accuracy_reward(texts, solution=[row["solution"] for *_, row in jobs], require_end_of_thinking=True)
    return [
        {
            "benchmark": name,
            "problem": problem,
            "sample": sample,
            "correct": bool(is_correct),
            "tokens": len(record.completion_ids),
            "steps": 1 + segmenter.count(record.completion_ids),
            "truncated": record.truncated,
            "finished": record.completion_ids[-1] == tokenizer.eos_token_id,
            "completion": text,
        }
        for (name, problem, sample, _), record, text, is_correct in zip(jobs, rollouts, texts, correct, strict=True)
    ]


def summarize(samples: pd.DataFrame, vanilla: pd.DataFrame) -> pd.DataFrame:
    """
    Accuracy, tokens, steps, compression rate and AES per benchmark, and overall as the mean over benchmarks.

    Args:
        samples ([`~pandas.DataFrame`]):
            Result of [`evaluate`].
        vanilla ([`~pandas.DataFrame`]):
            The same of the vanilla model on the same benchmarks.

    Returns:
        [`~pandas.DataFrame`]: indexed by benchmark, `"overall"` last, with `accuracy` (0..1), `tokens`, `steps`,
        `cr` and `aes`; the latter is NaN where the vanilla model solves nothing, since it is relative to that.
    """
    table, base = _means(samples), _means(vanilla)
    table["cr"] = table["tokens"] / base["tokens"]
    table.loc["overall", "cr"] = compression_rate(
        table["tokens"].drop("overall").to_dict(), base["tokens"].drop("overall").to_dict()
    )
    table["aes"] = [
        accuracy_efficiency_score(row.accuracy, row.tokens, base.accuracy[name], base.tokens[name])
        if base.accuracy[name] > 0
        else math.nan
        for name, row in table.iterrows()
    ]
    return table


def _means(samples: pd.DataFrame) -> pd.DataFrame:
    columns = {"correct": "accuracy", "tokens": "tokens", "steps": "steps"}
    per_problem = samples.groupby(["benchmark", "problem"], sort=False)[list(columns)].mean()
    table = per_problem.groupby("benchmark", sort=False).mean().rename(columns=columns)
    table.loc["overall"] = table.mean()
    return table
