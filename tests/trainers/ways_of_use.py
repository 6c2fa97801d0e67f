"""Rewards, data and models of the ways in which a trainer is used."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import trl
from datasets import Dataset, IterableDataset
from transformers import Qwen3Config, Qwen3ForSequenceClassification, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from step_trl import testbed


TEXTS = [
    f"<|im_start|>user\nCalculate {n} + {n * n * n}.<|im_end|>\n<|im_start|>assistant\n<think>\n" for n in range(9)
]
CONVERSATIONS = [[{"role": "user", "content": f"Calculate {n} + {n * n * n}."}] for n in range(9)]


def text_of(completion):
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)


def letters(completions, **kwargs):
    """Return rewards from 0 to 1 that almost always differ between the completions of a group."""
    return [sum(map(ord, text_of(completion))) % 97 / 96 for completion in completions]


def short_or_none(completions, log_metric=None, **kwargs):
    log_metric("letters", float(sum(len(text_of(completion)) for completion in completions)))
    return [None if len(text_of(completion)) % 2 else -len(text_of(completion)) / 50 for completion in completions]


def some_letters(completions, **kwargs):
    """Return rewards, but `None` for a third of the completions."""
    return [value if round(96 * value) % 3 else None for value in letters(completions)]


async def waits(completions, **kwargs):
    return letters(completions)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


class Counter:
    """An environment that owns its reward, which is 0 and 1 by turns."""

    turns = itertools.cycle([0.0, 1.0])

    def reset(self, **kwargs) -> str:
        self.count = len(str(kwargs["prompt"])) % 3
        return f" Count to {self.count}."

    def increment(self, step: int) -> int:
        """
        Increments the counter.

        Args:
            step: What is added.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return next(self.turns)


def sampled_elsewhere(prompts, trainer):
    ids = trainer.processing_class(prompts)["input_ids"]
    completions = [[20 + (len(ids[0]) * row + place) % 9 for place in range(2 + row)] for row in range(len(ids))]
    completions = [row + [2] * (len(row) % 2) for row in completions]  # others are cut off
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[-1.0] * len(row) for row in completions]}


@cache
def reward_model():
    set_seed(0)
    config = Qwen3Config(
        vocab_size=463, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0, name_or_path="reward-model",
    )  # fmt: skip
    return Qwen3ForSequenceClassification(config)


def moe():
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=463, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.1,
        decoder_sparse_step=1, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def with_tools():
    """The testbed's tokenizer with a chat template that knows tools."""
    tokenizer = testbed.load_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def rows(prompts=TEXTS, **columns):
    return Dataset.from_dict({"prompt": prompts} | columns)


def streamed():
    return IterableDataset.from_generator(lambda: ({"prompt": text} for text in TEXTS))
