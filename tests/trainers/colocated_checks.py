"""
The engine over a colocated vLLM model, and training with it. Run by `test_colocated.py` in a process of its own: vLLM
opens a process group, which would turn every later training of the process into a distributed one.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch
from rollout.tiny_models import assert_logprobs, log_probabilities, run
from rollout.well_formed import assert_well_formed
from small_runs import SMALL_RUN
from trl.generation import vllm_generation

from step_trl import StepGRPOConfig, StepGRPOTrainer, testbed
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import TransformersEngine, VLLMColocatedEngine
from step_trl.steps import TriggerSegmenter


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    problems = testbed.load_dataset("train").select(range(32))["prompt"]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]


@pytest.fixture(scope="module")
def trainer(tokenizer, tmp_path_factory):
    """Return a trainer. TRL leaves the dtype to vLLM, which would use half precision for a float32 model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, dtype="float32", enforce_eager=True))
        yield build(tokenizer, str(tmp_path_factory.mktemp("run")))


def build(tokenizer, folder):
    config = StepGRPOConfig(
        folder, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=512,
        num_generations=4, per_device_train_batch_size=8, max_completion_length=160, learning_rate=1e-3, seed=3,
        **SMALL_RUN | {"max_steps": 3},
    )  # fmt: skip
    return StepGRPOTrainer(
        str(testbed.MODEL_DIR),
        args=config,
        train_dataset=testbed.load_dataset("hard"),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def engine(trainer):
    return trainer._policy_engine.colocated


@pytest.fixture(scope="module")
def model():
    return testbed.load_model().eval()


@pytest.fixture(autouse=True)
def nothing_goes_on(engine):
    yield
    assert not engine._llm.has_unfinished_requests()
    assert not engine._requests and engine._worker is None


def test_greedy_calls_are_those_of_the_model(engine, model, tokenizer, prompts):
    calls = [{"max_tokens": 80, "temperature": 0.0, "stop": stop} for stop in [(), ("Wait",), ("=",), ()] * 4]
    found = run(*(engine.generate(prompt, **call) for prompt, call in zip(prompts, calls)))
    reference = TransformersEngine(model, tokenizer)
    expected = run(*(reference.generate(prompt, **call) for prompt, call in zip(prompts, calls)))
    for prompt, ours, theirs in zip(prompts, found, expected):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert_logprobs(model, prompt, ours)
    assert {generation.finish_reason for generation in found} >= {"stop", "length"}


def test_logprobs_of_given_tokens_are_the_models(engine, model, tokenizer, prompts):
    given = [tokenizer.encode(text, add_special_tokens=False) for text in ("12 + 7", "</think><|im_end|> 4", "Wait")]
    calls = [engine.generate(prompt, max_tokens=20, temperature=0.6) for prompt in prompts[:3]]
    found = run(*(engine.logprobs_of(prompt, ids) for prompt, ids in zip(prompts, given)), *calls)
    for prompt, ids, logprobs in zip(prompts, given, found):
        assert logprobs == pytest.approx(log_probabilities(model, prompt, ids).tolist(), abs=1e-3)
    assert all(len(one.logprobs) == len(one.token_ids) for one in found[3:])


def test_a_sampled_call_ends_at_its_stop(engine, tokenizer, prompts):
    for generation in run(*(engine.generate(p, max_tokens=250, stop=("Wait", "Alternatively")) for p in prompts)):
        ids = generation.token_ids
        assert len(ids) == len(generation.logprobs)
        if generation.finish_reason == "stop":
            assert TriggerSegmenter(tokenizer).occurrences(ids)[-1][1] == len(ids)
        else:
            assert generation.finish_reason == "length" or ids[-1] == tokenizer.eos_token_id


def test_a_call_is_abandoned_at_the_token_that_its_rule_names(engine, prompts):
    seen: list[int] = []

    def at_seven(token_ids, logprobs):
        seen.append(len(token_ids))
        return len(token_ids) == 7

    whole, abandoned = run(
        engine.generate(prompts[0], max_tokens=40, temperature=0.0),
        engine.generate(prompts[0], max_tokens=40, temperature=0.0, abandon=at_seven),
    )
    assert abandoned.finish_reason == "abandoned"
    assert abandoned.token_ids == whole.token_ids[:7]
    assert seen == list(range(1, 8))


def test_a_cancelled_call_is_aborted_and_holds_no_other(engine, prompts):
    async def scenario():
        calls = [asyncio.ensure_future(engine.generate(p, max_tokens=60, temperature=0.0)) for p in prompts[:8]]
        while engine._worker is None:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return calls

    calls = asyncio.run(scenario())
    assert [call.cancelled() for call in calls] == [True, False] * 4
    alone = run(*(engine.generate(p, max_tokens=60, temperature=0.0) for p in prompts[1:8:2]))
    assert [call.result().token_ids for call in calls[1::2]] == [generation.token_ids for generation in alone]


@pytest.mark.parametrize("speculative", [False, True], ids=["pausing", "speculative"])
def test_truncated_rollouts_are_those_of_the_model(engine, model, tokenizer, prompts, speculative):
    def roll_out(engine):
        sampling = SamplingParams(160, temperature=0.0)
        return DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], sampling, speculative).run(prompts)

    records, expected = roll_out(engine), roll_out(TransformersEngine(model, tokenizer))
    for record in records:
        assert_well_formed(record, tokenizer, max_tokens=160)
    assert sum(record.truncated for record in records) >= 8
    # But for one, which rounding in other batches may have changed.
    assert sum(ours.completion_ids != theirs.completion_ids for ours, theirs in zip(records, expected)) <= 1


def test_bad_calls_are_named(engine, prompts):
    with pytest.raises(ValueError, match=r"max_tokens: 600 .* max_model_len of 512"):
        run(engine.generate(prompts[0], max_tokens=600))

    def fails(token_ids, logprobs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(engine.generate(prompts[0], max_tokens=20, abandon=fails))


def test_a_model_with_other_log_probabilities_is_refused(trainer, tokenizer, monkeypatch):
    llm = trainer.vllm_generation.llm
    config = llm.llm_engine.vllm_config
    monkeypatch.setattr(config.model_config, "logprobs_mode", "raw_logprobs")
    with pytest.raises(ValueError, match=r"llm: its logprobs_mode is 'raw_logprobs'"):
        VLLMColocatedEngine(llm, tokenizer)


def test_trains(trainer, engine, prompts, monkeypatch):
    """vLLM's CPU build has repacked the weights: TRL's own update fails, and `reload_weights` packs them again."""

    def sync_weights(self):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._iter_named_params()})
        self.llm.reset_prefix_cache()

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", sync_weights)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    # At a learning rate this high, a model with old weights would be far off.
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logs)
    assert sum(entry["step_grpo/exit_rate"] for entry in logs) > 0
    moved = max((a - b).abs().max().item() for a, b in zip(before, trainer.model.parameters()))
    assert moved > 1e-4
    with torch.no_grad():
        evaluated = trainer.evaluate(testbed.load_dataset("easy").select(range(8)))  # TRL's plain calls, same model
    assert evaluated["eval_completions/mean_length"] > 0
