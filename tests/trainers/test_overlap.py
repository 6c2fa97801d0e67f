"""Trainings whose server samples the next batch during an update."""

import asyncio
import threading
from collections import defaultdict

import pytest
import torch
from rollout.faulty_proxy import FaultyProxy
from rollout.server_metrics import generated_tokens, open_requests, until
from small_runs import every_other
from transformers import TrainerCallback

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer, SPOConfig, testbed
from step_trl.rollout.engines import EngineUnavailableError, VLLMServerEngine
from step_trl.runtime import policy_engine
from step_trl.trainers import METHODS


pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def on_server(build, vllm_server, mixed_problems):
    def on_server(method, trainer_options=None, **options):
        return build(
            method,
            trainer_options={"reward_funcs": every_other} | (trainer_options or {}),
            **{
                "use_vllm": True,
                "vllm_mode": "server",
                "weight_sync": "disk",
                "weight_sync_check_every": 0,
                "vllm_server_base_url": vllm_server.url,
                "rollouts_ahead": 1,
                "max_completion_length": 48,
                "learning_rate": 1e-3,
                "train_dataset": mixed_problems,
            }
            | options,
        )

    return on_server


@pytest.fixture
def calls(monkeypatch):
    """
    The calls of engines: how many rollouts have begun, how many run, and both before and after each loading of
    weights. Each rollout lasts at least `calls["seconds"]`.
    """
    counts, lock = defaultdict(int), threading.Lock()
    counts["at loads"] = []
    for_rollout, load = VLLMServerEngine.for_rollout, VLLMServerEngine.load_weights

    def counted(self, prompt_ids):
        manager = for_rollout(self, prompt_ids)

        class Counted:
            async def __aenter__(self):
                with lock:
                    counts["begun"] += 1
                    counts["running"] += 1
                return await manager.__aenter__()

            async def __aexit__(self, *error):
                await asyncio.sleep(counts["seconds"])
                with lock:
                    counts["running"] -= 1
                return await manager.__aexit__(*error)

        return Counted()

    async def loading(self, folder):
        before = counts["begun"], counts["running"]
        await load(self, folder)
        counts["at loads"].append((*before, counts["begun"], counts["running"]))

    monkeypatch.setattr(VLLMServerEngine, "for_rollout", counted)
    monkeypatch.setattr(VLLMServerEngine, "load_weights", loading)
    return counts


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def record_generations(trainer):
    """Return a list that gets, for each training generation, what TRL returns and the weights at that time."""
    records, generate = [], trainer._generate_and_score_completions

    def recording(inputs):
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        output = generate(inputs)
        if trainer.model.training:
            records.append((output, weights))
        return output

    trainer._generate_and_score_completions = recording
    return records


@torch.no_grad()
def difference(output, weights):
    """Return the mean difference of the sampled log-probabilities from those of a model with these weights."""
    model = testbed.load_model().eval()
    model.load_state_dict(weights)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    length = output["completion_ids"].size(1)
    logits = model(ids, attention_mask=mask).logits[:, -length - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]
    sampled = output["completion_mask"].bool() & ~output["sampling_per_token_logps"].isnan()
    return (logps - output["sampling_per_token_logps"])[sampled].abs().mean().item()


@pytest.mark.parametrize("method", ["step_grpo", "sas"])
def test_each_batch_is_sampled_by_the_weights_before_the_last_update(method, on_server, calls, vllm_server):
    begun = []

    class AtTheEnd(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            until(lambda: calls["begun"] > 8 * (state.global_step + 1), 10.0 * (state.global_step < 3))
            begun.append(calls["begun"])

    trainer = on_server(method, {"callbacks": [AtTheEnd()]}, max_steps=4, max_completion_length=160)
    records = record_generations(trainer)
    trainer.train()
    assert logged(trainer, "rollouts_ahead/staleness") == [0, 1, 1, 1]
    assert len(logged(trainer, "rollouts_ahead/waited")) == 4
    # During an update, the next batch is begun, and nothing is sampled during the last one.
    assert all(8 * update < number <= 8 * (update + 1) for update, number in enumerate(begun[:3], start=1))
    assert begun[3] == calls["begun"] == 32
    # The first two batches have the same weights. Others are sent when nothing is sampled, before batches 3 and 4.
    assert calls["at loads"] == [(n, 0, n, 0) for n in (0, 16, 24)]
    assert open_requests(vllm_server.url) == 0
    for number, (output, _) in enumerate(records):
        mine, before = (records[index][1] for index in (number, max(0, number - 1)))
        assert difference(output, before) < 1e-3
        assert number == 0 or difference(output, mine) > 3e-3
    if method == "step_grpo":
        assert sum(logged(trainer, "step_grpo/exit_rate")) > 0


def test_an_evaluation_waits_for_the_batch_and_has_the_current_weights(on_server, calls, mixed_problems):
    calls["seconds"] = 2.0  # longer than an update
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    problem = {"eval_dataset": mixed_problems.select(range(1))}
    trainer = on_server("sas", problem, max_steps=2, max_completion_length=24, **evaluation)
    trainer.train()
    # Two batches, then after each update its weights and an evaluation; the first one waits for the second batch.
    assert calls["at loads"] == [(n, 0, n, 0) for n in (0, 16, 20)]
    assert all(value < 1e-3 for value in logged(trainer, "eval_sampling/sampling_logp_difference/max"))
    assert logged(trainer, "rollouts_ahead/staleness") == [0, 1]


def completions_of(trainer):
    """Return a list that gets the prompts and completions of each generation in training."""
    generations, generate = [], trainer._generate_single_turn

    def recording(prompt_ids, *args):
        completion_ids, logprobs = generate(prompt_ids, *args)
        if trainer.model.training:
            generations.append((list(prompt_ids), completion_ids))
        return completion_ids, logprobs

    trainer._generate_single_turn = recording
    return generations


def different(expected, found):
    """Return the number of completions that differ, of the same prompts."""
    assert [prompts for prompts, _ in expected] == [prompts for prompts, _ in found]
    pairs = [pair for one, two in zip(expected, found) for pair in zip(one[1], two[1], strict=True)]
    return sum(one != two for one, two in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_generation": 2, "max_steps": 7},
        {"num_iterations": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 1, "max_steps": 5},
    ],
    ids=["generations of two updates", "updates of two generations"],
)
def test_a_policy_that_stays_samples_as_without_overlap(options, on_server, calls, mixed_problems):
    """Also across epochs, around evaluations, and when it is resumed. Seeds belong to batches."""
    options |= {
        "learning_rate": 0.0,
        "seeded_rollouts": True,
        "per_device_train_batch_size": 4,
        "max_completion_length": 24,
        "train_dataset": mixed_problems.select(range(6)),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_eval_batch_size": 4,
        "trainer_options": {"eval_dataset": mixed_problems.select(range(1))},
    }
    plain = on_server("step_grpo", rollouts_ahead=0, **options)
    expected = completions_of(plain)
    plain.train()
    ahead = on_server("step_grpo", save_strategy="steps", save_steps=3, **options)
    found = completions_of(ahead)
    ahead.train()
    assert different(expected, found) <= 1  # rounding in other batches
    assert all(before[1] == after[1] == 0 for before, after in ((load[:2], load[2:]) for load in calls["at loads"]))

    resumed = on_server("step_grpo", **options)
    rest = completions_of(resumed)
    resumed.train(resume_from_checkpoint=f"{ahead.args.output_dir}/checkpoint-3")
    assert 2 <= len(rest) < len(expected)
    assert different(expected[-len(rest) :], rest) <= 1
    assert max(logged(resumed, "rollouts_ahead/staleness")) > 0


def test_batches_that_are_compared_are_not_sampled_ahead(on_server, monkeypatch):
    compared, check = [], policy_engine.check_log_probabilities

    def recording(*args, **options):
        compared.append(trainer.state.global_step)
        check(*args, **options)

    monkeypatch.setattr(policy_engine, "check_log_probabilities", recording)
    trainer = on_server("sas", max_steps=5, weight_sync_check_every=2)
    trainer.train()
    assert compared == [0, 2, 4]
    assert logged(trainer, "rollouts_ahead/staleness") == [0, 1, 0, 1, 0]


def test_an_interrupted_training_leaves_nothing_running(on_server, vllm_server):
    def interrupting(completions, **_):
        """Ctrl-C while the first batch is scored, and the server samples the second one."""
        assert until(lambda: open_requests(vllm_server.url) > 0, 20)
        raise KeyboardInterrupt

    threads = threading.active_count()
    trainer = on_server("step_grpo", {"reward_funcs": interrupting}, max_completion_length=600, max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert until(lambda: open_requests(vllm_server.url) == 0, 2)
    sampled = generated_tokens(vllm_server.url)
    assert until(lambda: threading.active_count() <= threads, 2)
    assert generated_tokens(vllm_server.url) == sampled


def test_a_server_that_goes_away_ends_the_training_between_two_updates(on_server, vllm_server, caplog):
    class EndOfServer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                proxy.go_away()

    with FaultyProxy(vllm_server.url) as proxy:
        options = {"max_steps": 4, "vllm_server_timeout": 1.0, "vllm_server_base_url": proxy.url}
        trainer = on_server("sas", {"callbacks": [EndOfServer()]}, **options)
        with pytest.raises(EngineUnavailableError, match="step-trl serve MODEL"):
            trainer.train()
        assert trainer.state.global_step == 2
        proxy.come_back()
        resumed = on_server("sas", **options)
        resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert logged(resumed, "rollouts_ahead/staleness") == [0, 1, 0, 1]


class Twice(EfficientReasoningTrainer):
    def sample(self, batch):
        return self.run_rollouts(batch.prompt_ids)


class Choosing(EfficientReasoningTrainer):
    def choose_rows(self, batch):
        return batch.rows


@pytest.mark.parametrize(
    ("trainer_class", "options", "arguments", "message"),
    [
        (Twice, {}, {}, "rollouts_ahead: 1 is not supported by .*own way. Set rollouts_ahead=0"),
        (Choosing, {}, {}, "rollouts_ahead: 1 is not supported by .*own way. Set rollouts_ahead=0"),
        (EfficientReasoningTrainer, {}, {"rollout_func": every_other}, "rollout_func: .* Set rollouts_ahead=0"),
        (
            EfficientReasoningTrainer,
            {"weight_sync_check_every": 2, "num_iterations": 2},
            {},
            "weight_sync_check_every: 2 .* Set a number above 2, or 0",
        ),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(
    trainer_class, options, arguments, message, on_server, mixed_problems, monkeypatch
):
    monkeypatch.setitem(METHODS, "refused", (trainer_class, EfficientReasoningConfig))
    with pytest.raises(ValueError, match=message):
        on_server("refused", arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts_ahead": 2}, "rollouts_ahead: 2 .* Set 1, or 0"),
        ({"use_vllm": False}, "rollouts_ahead: 1 needs servers.* Set use_vllm=True and vllm_mode='server'"),
        ({"vllm_mode": "colocate", "weight_sync": "nccl"}, "rollouts_ahead: 1 needs servers"),
        ({"vllm_importance_sampling_correction": False}, "vllm_importance_sampling_correction: False .* Set it to Tr"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1 .* or set rollouts_ahead=0"),
        ({"config_class": SPOConfig}, "rollouts_ahead: 1 is not supported by this method"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    config_class = options.pop("config_class", EfficientReasoningConfig)
    servers = {"use_vllm": True, "vllm_mode": "server", "rollouts_ahead": 1}
    with pytest.raises(ValueError, match=message):
        config_class(str(tmp_path), bf16=False, **servers | options)
