from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from step_trl.rollout.engines import Generation, TransformersEngine
from step_trl.rollout.engines.sampling import SamplingOptions, process_logits, sample, uniforms
from step_trl.steps import token_bytes


TEXT = (
    "Wait, that is wrong. Alternatively, we add the two numbers.\n\nSo the answer is 12. Waiting for it: 34 + 56 = 90."
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def build_model(kind: str = "qwen3", attention: str = "sdpa", **options):
    """Weights so large that no two logits are close: greedy decoding does not depend on rounding."""
    torch.manual_seed(0)
    shape = dict(
        vocab_size=310,  # more than the tokenizer has
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if kind == "llama" else 4,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        attn_implementation=attention,
    )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **options)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8, **options)).eval()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, eos_token_ids=())


def random_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 300, generator.integers(1, longest)).tolist() for _ in range(count)]


def run(*coroutines):
    async def gather():
        return await asyncio.gather(*coroutines)

    return asyncio.run(gather())


@torch.no_grad()
def reference(model, prompt: list[int], max_tokens: int) -> list[int]:
    """What `model.generate` decodes greedily, without EOS."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                            eos_token_id=None, pad_token_id=0)  # fmt: skip
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def log_probabilities(model, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """Of `token_ids` behind `prompt`, by one plain forward."""
    logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def assert_logprobs(model, prompt: list[int], generation: Generation, tolerance: float = 1e-5) -> None:
    expected = log_probabilities(model, prompt, generation.token_ids)
    torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=tolerance, rtol=0)


@pytest.fixture
def batch_sizes(model):
    """The number of rows of each forward."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    yield sizes
    hook.remove()


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


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


def test_uniforms_are_uniform_and_independent():
    seeds, counters = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300), indexing="ij")
    numbers = uniforms(seeds, counters)
    assert 0 <= numbers.min() and numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 150  # chi-square, 99 degrees of freedom: 0.999 quantile
    for neighbour in (numbers[1:], numbers[:, 1:]):
        here = numbers[: neighbour.shape[0], : neighbour.shape[1]]
        assert abs(np.corrcoef(here.ravel(), neighbour.ravel())[0, 1]) < 0.012


def test_tokens_are_drawn_from_the_softmax():
    count, vocab = 50_000, 12
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 3] = -torch.inf
    numbers = torch.from_numpy(uniforms(np.full(count, 11), np.arange(count)))
    ids, logprobs = sample(logits.expand(count, -1), SamplingOptions(), numbers)
    expected = logits.softmax(-1)[0].double() * count
    observed = torch.bincount(ids, minlength=vocab)
    assert observed[3] == 0
    kept = expected > 0
    assert ((observed - expected) ** 2 / expected)[kept].sum() < 29.6  # chi-square, 10 degrees of freedom: 0.999
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[ids])


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    ids, _ = sample(logits, SamplingOptions(), torch.tensor([0.0, 0.5, 1 - 2**-52], dtype=torch.float64))
    assert ids.tolist() == [1, 3, 3]


def test_filters_equal_those_of_transformers():
    cases = [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1),
             (0.7, 20, 0.8, 0.05), (1.5, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (2.0, 1000, 0.99, 0.01)]  # fmt: skip
    logits = (torch.randn(len(cases), 50, generator=torch.Generator().manual_seed(1)) * 3).round(decimals=1)  # ties
    fields = ("temperature", "top_k", "top_p", "min_p")
    options = np.array(cases, dtype=[(name, np.float64) for name in fields])
    processed = process_logits(logits, SamplingOptions.from_rows(options))
    for row, (temperature, top_k, top_p, min_p) in enumerate(cases):
        expected = TemperatureLogitsWarper(temperature)(None, logits[row : row + 1])
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        expected = MinPLogitsWarper(min_p)(None, expected) if min_p else expected
        assert torch.equal(processed[row], expected[0]), cases[row]


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
    generation, full = run(
        engine.generate(prompt, max_tokens=20, temperature=0.0), engine.generate([5], max_tokens=2, seed=0)
    )
    assert (generation.token_ids, generation.finish_reason) == (expected, "eos")
    assert set(np.flatnonzero(TransformersEngine(model, tokenizer)._eos)) == {1}


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


# When things go otherwise


def test_cancelling_a_call_frees_its_row(engine, model, batch_sizes):
    prompts = random_prompts(3)
    expected = [reference(model, prompt, 20) for prompt in prompts]

    async def scenario():
        tasks = [asyncio.ensure_future(engine.generate(prompt, max_tokens=20, temperature=0.0)) for prompt in prompts]
        while engine.stats.sampled_tokens < 3 * 5:
            await asyncio.sleep(0)
        tasks[1].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[1], asyncio.CancelledError)
        assert [done[0].token_ids, done[2].token_ids] == [expected[0], expected[2]]

    asyncio.run(scenario())
    assert engine.stats.sampled_tokens == 3 * 5 + 2 * 15
    assert batch_sizes[-15:] == [2] * 15
    assert engine._rows.num_active == 0


def test_a_failing_forward_fails_every_call_and_no_later_one(model, tokenizer):
    engine = TransformersEngine(model, tokenizer, max_batch_size=2)

    def fail(*args):
        raise RuntimeError("out of order")

    hook = model.lm_head.register_forward_hook(fail)
    model.train()

    async def scenario():
        calls = (engine.generate([5, 6, 7], max_tokens=3) for _ in range(5))  # three of them wait for a row
        return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(scenario())
    hook.remove()
    assert [str(error) for error in errors] == ["out of order"] * 5
    assert any("fail" in str(entry.name) for entry in pytest.ExceptionInfo.from_exception(errors[0]).traceback)
    assert all(module.training for module in model.modules())
    model.eval()
    (generation,) = run(engine.generate([5, 6, 7], max_tokens=3, temperature=0.0))
    assert generation.token_ids == reference(model, [5, 6, 7], 3)


def test_a_failing_abandon_rule_fails_its_own_call(engine):
    async def scenario():
        calls = [engine.generate([5], max_tokens=4, abandon=lambda *_: 1 / 0), engine.generate([5], max_tokens=4)]
        return await asyncio.gather(*calls, return_exceptions=True)

    broken, fine = asyncio.run(scenario())
    assert isinstance(broken, ZeroDivisionError) and len(fine.token_ids) == 4


def test_logits_that_are_not_finite_are_an_error(tokenizer):
    model = build_model()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        run(TransformersEngine(model, tokenizer).generate([5], max_tokens=2))


def test_event_loops_that_ended_early_leave_nothing_behind(engine, model):
    async def deserted():
        task = asyncio.ensure_future(engine.generate([5, 6], max_tokens=400))
        await ticks(30)
        assert not task.done()

    async def deserted_at_once():
        asyncio.ensure_future(engine.generate([5, 6], max_tokens=400))
        await asyncio.sleep(0)

    for scenario in (deserted, deserted_at_once):
        asyncio.run(scenario())
        (generation,) = run(engine.generate([5, 6], max_tokens=9, temperature=0.0))
        assert generation.token_ids == reference(model, [5, 6], 9)

    async def all_cancelled(turns: int):
        task = asyncio.ensure_future(engine.generate([5, 6], max_tokens=400))
        await ticks(turns)
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        generation = await engine.generate([5, 6], max_tokens=9, temperature=0.0)
        assert generation.token_ids == reference(model, [5, 6], 9)

    asyncio.run(all_cancelled(1))  # before the worker's first step
    asyncio.run(all_cancelled(30))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.wait([loop.create_task(engine.generate([5], max_tokens=400))], timeout=0.01))
    loop.close()
    (generation,) = run(engine.generate([5, 6], max_tokens=9, temperature=0.0))
    assert generation.token_ids == reference(model, [5, 6], 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids: is empty"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": 511}, "at most 510"),
        ({"stop": "Wait"}, "stop: 'Wait'"),
        ({"stop": ("",)}, "stop"),
        ({"temperature": -1.0}, "temperature: -1.0"),
    ],
)
def test_wrong_arguments_are_named(engine, options, message):
    with pytest.raises(ValueError, match=message):
        run(engine.generate(**({"prompt_ids": [5, 6], "max_tokens": 4} | options)))


def test_unsupported_models_and_bounds_are_named(model, tokenizer):
    shape = {"vocab_size": 310, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    sliding = MistralForCausalLM(MistralConfig(**shape, sliding_window=16))
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        TransformersEngine(sliding, tokenizer)
    with pytest.raises(ValueError, match="flex_attention"):
        TransformersEngine(build_model(attention="flex_attention"), tokenizer)
    with pytest.raises(ValueError, match="max_rows: 3"):
        TransformersEngine(model, tokenizer, max_batch_size=4, max_rows=3)


# The model in training


def test_a_training_model_generates_without_dropout_and_gets_its_modes_back(tokenizer):
    model = build_model(attention_dropout=0.5)
    expected = reference(model, [5, 6, 7], 20)
    model.train()
    model.lm_head.eval()
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())

    async def scenario():
        generation = await engine.generate([5, 6, 7], max_tokens=20, temperature=0.0)
        return generation, [module.training for module in model.modules()]  # before anything else runs

    generation, modes = asyncio.run(scenario())
    assert generation.token_ids == expected
    assert modes == [module is not model.lm_head for module in model.modules()]


def test_gradients_are_unaffected(tokenizer):
    model = build_model()
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    with torch.inference_mode():
        run(engine.generate([5, 6, 7], max_tokens=5))
    run(engine.generate([5, 6, 7, 8], max_tokens=5))
    buffers = [layer.keys for layer in engine._rows.cache.layers]
    assert not any(buffer.requires_grad or buffer.is_inference() for buffer in buffers)
    assert torch.is_grad_enabled()
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_new_weights_need_a_new_cache(tokenizer):
    model = build_model()
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    prompt = random_prompts(1)[0]
    run(engine.generate(prompt, max_tokens=10, temperature=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.drop_prefix_cache()
    (generation,) = run(engine.generate(prompt, max_tokens=10, temperature=0.0))
    assert generation.token_ids == reference(model, prompt, 10)
    assert_logprobs(model, prompt, generation)

    async def too_early():
        task = asyncio.ensure_future(engine.generate(prompt, max_tokens=50))
        await ticks(30)
        with pytest.raises(RuntimeError, match="1 calls are running"):
            engine.drop_prefix_cache()
        task.cancel()
        await ticks(1)
        engine.drop_prefix_cache()

    asyncio.run(too_early())


def test_peft_models(tokenizer):
    peft = pytest.importorskip("peft")
    model = build_model()
    plain = reference(model, [5, 6, 7], 12)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    wrapped.eval()
    engine = TransformersEngine(wrapped, tokenizer, eos_token_ids=())
    (generation,) = run(engine.generate([5, 6, 7], max_tokens=12, temperature=0.0))
    assert generation.token_ids == reference(wrapped, [5, 6, 7], 12) != plain


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(tokenizer, autocast):
    model = build_model() if autocast else build_model().to(torch.bfloat16)
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    prompt = random_prompts(1, seed=2)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        both = run(*(engine.generate(prompt, max_tokens=8, seed=i) for i in range(2)))
        for generation in both:
            expected = log_probabilities(model, prompt, generation.token_ids).float()
            assert torch.isfinite(expected).all()
            torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=0.5, rtol=0.1)
