"""The in-process engine when calls are cancelled or fail, and around a model in training."""

from __future__ import annotations

import asyncio

import pytest
import torch
from rollout.tiny_models import assert_logprobs, build_model, log_probabilities, random_prompts, reference, run, ticks
from transformers import T5Config, T5ForConditionalGeneration

from step_trl.rollout.engines import Generation, TransformersEngine


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


def test_running_out_of_memory_fails_every_call(engine, model, monkeypatch):
    def fail(*args):
        raise MemoryError("no room for 17 rows")

    async def scenario():
        return await asyncio.gather(
            *(engine.generate([5, 6], max_tokens=3) for _ in range(20)), return_exceptions=True
        )

    with monkeypatch.context() as patch:
        patch.setattr(engine._rows, "_vacate", fail)
        assert [type(error) for error in asyncio.run(scenario())] == [MemoryError] * 20
    assert [type(result) for result in asyncio.run(scenario())] == [Generation] * 20


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
        task = asyncio.ensure_future(engine.generate([5, 6], max_tokens=400))
        await ticks(1)
        assert not task.done()

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
    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=420, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a causal language model"):
        TransformersEngine(seq2seq, tokenizer)
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
