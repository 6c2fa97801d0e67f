"""The in-process engine returns what its model would, for every call, whatever the other calls are."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest
import torch
from rollout.tiny_models import (
    assert_logprobs,
    build_model,
    log_probabilities,
    random_prompts,
    reference,
    run,
    ticks,
)

from step_trl.rollout.engines import Generation, TransformersEngine
from step_trl.steps import token_bytes


# Equality with the model


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_and_logprobs_equal_the_model(kind, attention, tokenizer):
    model = build_model(kind, attention)
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    prompts = random_prompts(12, longest=150)  # the cache grows from 128 positions and 16 rows on

    async def late(index: int, prompt: list[int], temperature: float) -> Generation:
        await ticks(7 * index)
        return await engine.generate(prompt, max_tokens=5 + 3 * index, temperature=temperature)

    greedy = [late(i, prompt, 0.0) for i, prompt in enumerate(prompts)]
    sampled = [late(i, prompt, 1.0) for i, prompt in enumerate(prompts)]
    results = run(*greedy, *sampled)
    for index, (prompt, generation) in enumerate(zip(prompts, results)):
        assert generation.finish_reason == "length"
        assert generation.token_ids == reference(model, prompt, 5 + 3 * index)
    for prompt, generation in zip(prompts * 2, results):
        assert_logprobs(model, prompt, generation)


def test_logprobs_of_given_tokens_are_the_models(model, tokenizer):
    """Whatever else is sampled meanwhile, and though one of the tokens ends other calls."""
    engine = TransformersEngine(model, tokenizer, max_batch_size=5)
    prompts = random_prompts(6)
    given = [[*random_prompts(1, seed=place)[0][: 1 + place], tokenizer.eos_token_id, 7] for place in range(6)]
    sampled = [engine.generate(p, max_tokens=6, temperature=0.5, top_k=3, stop=("e",), seed=1) for p in prompts]
    found = run(*(engine.logprobs_of(p, ids) for p, ids in zip(prompts, given)), *sampled)
    for prompt, ids, logprobs in zip(prompts, given, found):
        assert logprobs == pytest.approx(log_probabilities(model, prompt, ids).tolist(), abs=1e-4)
    assert engine.stats.sampled_tokens == sum(len(generation.token_ids) for generation in found[6:])
    alone = run(*(engine.generate(p, max_tokens=6, temperature=0.5, top_k=3, stop=("e",), seed=1) for p in prompts))
    assert [one.token_ids for one in alone] == [one.token_ids for one in found[6:]]
    with pytest.raises(ValueError, match="max_tokens: 0 samples nothing"):
        run(engine.logprobs_of(prompts[0], []))


def test_the_cache_grows_while_decoding(engine, model):
    (generation,) = run(engine.generate([5, 6, 7], max_tokens=400, temperature=0.0))
    assert generation.token_ids == reference(model, [5, 6, 7], 400)
    assert_logprobs(model, [5, 6, 7], generation)


def test_calls_in_pieces_equal_one_call_under_every_memory_bound(model, tokenizer):
    prompts = [*random_prompts(6), *random_prompts(2, seed=1) * 2]
    expected = [reference(model, prompt, 40) for prompt in prompts]
    answer_to = functools.cache(lambda *path: reference(model, list(path), 3))

    async def in_pieces(engine, prompt: list[int], index: int) -> list[int]:
        path = list(prompt)
        while len(path) < len(prompt) + 40:
            piece = min(4 + index, len(prompt) + 40 - len(path))
            probe = asyncio.ensure_future(engine.generate([*path, 9, 8, 7], max_tokens=3, temperature=0.0))
            generation = await engine.generate(path, max_tokens=piece, temperature=0.0)
            assert_logprobs(model, path, generation)
            answer = await probe
            assert answer.token_ids == answer_to(*path, 9, 8, 7)
            path += generation.token_ids
        return path[len(prompt) :]

    for options in ({"max_batch_size": 1}, {"max_batch_size": 3, "max_rows": 3}, {"max_batch_size": 5}, {}):
        engine = TransformersEngine(model, tokenizer, eos_token_ids=(), **options)
        assert run(*(in_pieces(engine, p, i) for i, p in enumerate(prompts))) == expected
        assert len(engine._rows.state) <= engine._rows.max_rows
        assert engine._rows.num_active == 0


def test_prefixes_are_computed_once(engine):
    prompt = random_prompts(1, longest=60, seed=5)[0] * 2

    async def scenario():
        first = await asyncio.gather(*(engine.generate(prompt, max_tokens=6, seed=i) for i in range(5)))
        assert engine.stats.prefilled_tokens == len(prompt) + 4
        assert engine.stats.forwards == 1 + 6

        path = prompt + first[0].token_ids
        rows = int((engine._rows.state["known"] > 0).sum())
        await engine.generate(path, max_tokens=4)
        assert engine.stats.prefilled_tokens == len(prompt) + 5  # the last sampled token
        assert int((engine._rows.state["known"] > 0).sum()) == rows  # adopted, not copied
        assert engine.stats.forwards == 1 + 6 + 4

    asyncio.run(scenario())


def test_follow_ups_run_in_the_next_tick(engine, batch_sizes):
    """Two tasks per step, as in speculative probing: no forward may run with one of them missing."""

    async def one_rollout(prompt: list[int]) -> None:
        path = prompt
        for _ in range(5):
            both = [asyncio.ensure_future(engine.generate(path, max_tokens=4, seed=i)) for i in range(2)]
            done = await asyncio.gather(*both)
            path = path + done[0].token_ids

    run(one_rollout([5]), one_rollout([6]), engine.generate([7], max_tokens=20))
    assert batch_sizes == [5] * 20


# Sampling


def test_seeded_calls_do_not_depend_on_company(model, tokenizer):
    prompts = random_prompts(10)
    calls = [
        {"max_tokens": 30, "seed": 2**63 + i, "temperature": 0.7 + 0.1 * i, "top_k": [0, 20][i % 2],
         "top_p": [1.0, 0.9, 0.8][i % 3], "min_p": [0.0, 0.02][i % 2]}
        for i in range(10)
    ]  # fmt: skip
    alone = []
    for prompt, options in zip(prompts, calls):
        alone += run(TransformersEngine(model, tokenizer).generate(prompt, **options))
    engine = TransformersEngine(model, tokenizer, max_batch_size=7)
    crowd = run(*(engine.generate(prompt, **options) for prompt, options in zip(prompts, calls)),
                *(engine.generate(prompt, max_tokens=20) for prompt in prompts))  # fmt: skip
    assert [g.token_ids for g in crowd[:10]] == [g.token_ids for g in alone]


def test_unseeded_calls_follow_the_global_generator(engine):
    def draw() -> list[list[int]]:
        return [g.token_ids for g in run(*(engine.generate([5, 6, 7], max_tokens=8) for _ in range(4)))]

    torch.manual_seed(3)
    first = draw()
    second = draw()
    torch.manual_seed(3)
    assert draw() == first != second
    assert len({tuple(ids) for ids in first}) == 4


def test_logprobs_are_those_of_the_processed_distribution(engine, model):
    prompt = random_prompts(1)[0]
    options = {"max_tokens": 12, "temperature": 0.5, "top_k": 4, "seed": 0}
    # Beside rows with other options, as those share one batch.
    generation, *_ = run(engine.generate(prompt, **options), engine.generate(prompt, max_tokens=12, temperature=0.0))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1] / 0.5
    logits[logits < logits.topk(4).values[:, -1:]] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-5, rtol=0)


# How calls end


def test_eos_ends_a_call(model, tokenizer):
    prompt = random_prompts(1)[0]
    tokens = reference(model, prompt, 20)
    eos = tokens[7]
    expected = tokens[: tokens.index(eos) + 1]
    engine = TransformersEngine(model, tokenizer, eos_token_ids=[eos])
    (generation,) = run(engine.generate(prompt, max_tokens=20, temperature=0.0))
    assert (generation.token_ids, generation.finish_reason) == (expected, "eos")
    assert np.flatnonzero(TransformersEngine(model, tokenizer)._scheduler.eos).tolist() == [tokenizer.eos_token_id]


def test_stop_strings_end_a_call_exactly(engine, tokenizer):
    """Every short piece of a sampled text, from within a token to several tokens long, as a stop string."""
    pieces = token_bytes(tokenizer) + [b""] * 10
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 4}
    (full,) = run(engine.generate([5, 6], **options))
    data = b"".join(pieces[token_id] for token_id in full.token_ids)
    stops = {data[i : i + n].decode("utf-8", "ignore") for i in range(len(data)) for n in (1, 2, 3, 5, 9)} - {""}
    stops = sorted(stop for stop in stops if stop.encode() in data)
    assert len(stops) > 60

    def expected_length(stop: tuple[str, ...]) -> int:
        for length in range(1, len(full.token_ids) + 1):
            text = b"".join(pieces[token_id] for token_id in full.token_ids[:length])
            if any(string.encode() in text for string in stop):
                return length
        raise AssertionError

    sets = [*((stop,) for stop in stops), *zip(stops[::3], stops[1::3])]
    for stop, generation in zip(sets, run(*(engine.generate([5, 6], stop=stop, **options) for stop in sets))):
        assert generation.token_ids == full.token_ids[: expected_length(stop)]
        assert generation.finish_reason == "stop"


def test_stop_strings_do_not_look_into_the_prompt(engine, tokenizer):
    prompt = tokenizer("Wai")["input_ids"]
    (full,) = run(engine.generate(prompt, max_tokens=6, seed=1))
    first = tokenizer.decode(full.token_ids[:1])
    (generation,) = run(engine.generate(prompt, max_tokens=6, seed=1, stop=("Wai" + first,)))
    assert generation == full


def test_abandon_ends_a_call(engine):
    seen = []

    def third(token_ids, logprobs) -> bool:
        seen.append((len(token_ids), len(logprobs)))
        return len(token_ids) == 3

    prompt = random_prompts(1)[0]
    full, abandoned = run(
        engine.generate(prompt, max_tokens=10, temperature=0.0),
        engine.generate(prompt, max_tokens=10, temperature=0.0, abandon=third),
    )
    assert abandoned.finish_reason == "abandoned"
    assert abandoned.token_ids == full.token_ids[:3]
    assert abandoned.logprobs == pytest.approx(full.logprobs[:3], abs=1e-5)
    assert seen == [(1, 1), (2, 2), (3, 3)]
