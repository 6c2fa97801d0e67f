"""Tiny models with random weights, what they must answer, and a way to run calls of an engine beside each other."""

from __future__ import annotations

import asyncio

import numpy as np
import torch
from small_tokenizers import trained
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from step_trl.rollout.engines import Generation


def build_model(kind: str = "qwen3", attention: str | None = "sdpa", **options) -> PreTrainedModel:
    """Weights so large that no two logits are close: greedy decoding does not depend on rounding."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(trained()) + 10,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if kind == "llama" else 4,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": trained().eos_token_id,
        "pad_token_id": trained().pad_token_id,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(kind, **shape | options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def random_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 300, generator.integers(1, longest)).tolist() for _ in range(count)]


def run(*coroutines):
    async def gather():
        return await asyncio.gather(*coroutines)

    return asyncio.run(gather())


@torch.no_grad()
def reference(model, prompt: list[int], max_tokens: int) -> list[int]:
    """Return what `model.generate` decodes greedily, without EOS."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                            eos_token_id=None, pad_token_id=0)  # fmt: skip
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def log_probabilities(model, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities of `token_ids` after `prompt`, by one plain forward pass."""
    logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def assert_logprobs(model, prompt: list[int], generation: Generation, tolerance: float = 1e-5) -> None:
    expected = log_probabilities(model, prompt, generation.token_ids)
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=tolerance, rtol=0)


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
