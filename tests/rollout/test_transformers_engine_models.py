"""The in-process engine on models whose cache is not simply the keys and values of all positions."""

from __future__ import annotations

import asyncio

import pytest
from rollout.tiny_models import assert_logprobs, build_model, random_prompts, reference, ticks

from step_trl.rollout.engines import TransformersEngine


WINDOW = 16
SLIDING_AND_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "expand": 2}
CACHED = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": SLIDING_AND_FULL,
    "gemma3_text": SLIDING_AND_FULL,
    "gemma3n_text": {
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 1000, "hidden_size_per_layer_input": 8,
    },
    "cohere2": SLIDING_AND_FULL,
    "qwen2": SLIDING_AND_FULL | {"use_sliding_window": True},
    "gpt_oss": SLIDING_AND_FULL | EXPERTS,
    "llama4_text": EXPERTS
    | {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48,
       "layer_types": ["chunked_attention", "full_attention"]},
    "qwen3_next": LINEAR
    | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "mamba2": MAMBA,
}  # fmt: skip
UNCACHED = {
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "bloom": {},
    "rwkv": {"attention_hidden_size": 32, "context_length": 512},
}
TOLERANCES = {"qwen3_next": 1e-4}  # in chunks and token by token, its recurrence rounds otherwise
MODELS = [*((kind, options, True) for kind, options in CACHED.items()),
          *((kind, options, False) for kind, options in UNCACHED.items())]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "cached"), MODELS, ids=[kind for kind, *_ in MODELS])
def test_rollouts_equal_the_model(kind, options, cached, tokenizer):
    """Prompts shorter and longer than the window, started at different times; probes; a cancelled call."""
    model = build_model(kind, None, **options)
    engine = TransformersEngine(model, tokenizer, max_batch_size=6, max_rows=7, eos_token_ids=())
    answers: list[tuple[list[int], list[int]]] = []

    async def roll_out(prompt: list[int], wait: int) -> None:
        await ticks(wait)
        path = list(prompt)
        for length in (3, 2 * WINDOW):
            probe = asyncio.ensure_future(engine.generate([*path, 9, 8, 7], max_tokens=4, temperature=0.0))
            segment = await engine.generate(path, max_tokens=length, temperature=0.0)
            answer = await probe
            for start, generation in ((path, segment), ([*path, 9, 8, 7], answer)):
                assert_logprobs(model, start, generation, TOLERANCES.get(kind, 1e-5))
                answers.append((start, generation.token_ids))
            path = path + segment.token_ids

    async def give_up(prompt: list[int]) -> None:
        call = asyncio.ensure_future(engine.generate(prompt, max_tokens=300))
        await ticks(40)
        call.cancel()

    async def scenario() -> None:
        prompts = [[5], *random_prompts(3, longest=3 * WINDOW), random_prompts(1, longest=3 * WINDOW)[0] * 2]
        await asyncio.gather(*(roll_out(p, 7 * i) for i, p in enumerate(prompts)), roll_out(prompts[1], 0),
                             give_up(prompts[-1]))  # fmt: skip

    asyncio.run(scenario())
    assert len(answers) == 6 * 4
    for start, token_ids in answers[::5]:
        assert token_ids == reference(model, start, len(token_ids))
    assert (engine.stats.reused_tokens > 0) == cached


def test_a_fork_of_a_recurrence_computes_only_what_is_new(tokenizer):
    model = build_model("qwen3_next", None, **CACHED["qwen3_next"])
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    prompt = random_prompts(1, longest=60, seed=5)[0]

    async def scenario() -> None:
        first = await asyncio.gather(*(engine.generate(prompt, max_tokens=6, seed=i) for i in range(5)))
        assert engine.stats.prefilled_tokens == len(prompt) + 4
        path = prompt + first[0].token_ids
        await asyncio.gather(engine.generate([*path, 9, 8], max_tokens=2), engine.generate(path, max_tokens=2))
        assert engine.stats.prefilled_tokens == len(prompt) + 4 + 3 + 1
        await engine.generate(path[:-3], max_tokens=2)  # of which no state is kept
        assert engine.stats.prefilled_tokens == len(prompt) + 4 + 3 + 1 + len(path) - 3

    asyncio.run(scenario())


def test_a_model_without_rows_of_a_cache_is_named(tokenizer, caplog):
    TransformersEngine(build_model("rwkv", None, **UNCACHED["rwkv"]), tokenizer)
    assert "the cache of 'rwkv' cannot hold rows at different positions" in caplog.text
