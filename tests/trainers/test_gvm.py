"""GVMTrainer end to end on the testbed model."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from loss_records import record_losses
from peft import LoraConfig

from step_trl import GVMConfig, testbed
from step_trl.runtime.gradient_norms import check_whole_embeddings
from step_trl.trainers.gvm_budget import shuffled_indices


SHORT = {"max_completion_length": 24, "estimate_samples": 2, "generations_per_estimate": 2}


def first_letters(completions, **_):
    """A verdict that differs between completions of a prompt, so that some are accepted in a few tokens."""
    return [float(sum(map(ord, completion[0]["content"])) % 3 == 0) for completion in completions]


def gvm(build, *, steps=1, **options):
    more = {"reward_funcs": first_letters} | options.pop("trainer_options", {})
    return build("gvm", trainer_options=more, max_steps=steps, **SHORT | options)


def test_prompts_are_sampled_as_often_as_their_budget(build, credited):
    trainer = gvm(build, loss="grpo")
    made = []
    original = trainer._budget._estimate
    trainer._budget._estimate = lambda *args: made.append(original(*args)) or made[-1]
    batch, _, _, advantages = credited(trainer)

    (estimates,) = made
    logged = trainer.state.log_history[0]
    assert len(estimates) == 4  # 16 completions in two generations, 4 for a prompt on average
    assert logged["budget/mean"] == 4
    assert logged["budget/accept_rate"] == pytest.approx(sum(one.rate for one in estimates) / 4)
    assert logged["budget/estimate_tokens"] == sum(one.tokens for one in estimates) > 0
    assert logged["budget/estimate_seconds"] > 0
    assert all((one.norm > 0) == (one.rate > 0) for one in estimates)

    # All completions of a group are of the same prompt, and it has no other group.
    prompts = [row["prompt"][-1]["content"] for row in batch.rows]
    assert Counter(trainer._groups).keys() == {
        group for group, _ in set(zip(trainer._groups, prompts, strict=True))
    } and len(set(zip(trainer._groups, prompts, strict=True))) == len(set(trainer._groups))
    assert trainer._budget._queue and len(trainer._budget._queue) == 8
    for group in set(trainer._groups):
        own = [advantages[place].item() for place in range(8) if trainer._groups[place] == group]
        scores = torch.tensor([batch.scores[place].item() for place in range(8) if trainer._groups[place] == group])
        expected = (scores - scores.mean()) / (scores.std() + 1e-6) if len(own) > 1 else scores / (1 + 1e-6)
        assert own == pytest.approx(expected.tolist(), abs=1e-5)


def test_accepted_completions_alone_are_trained_on(build, credited):
    trainer = gvm(build)
    batch, inputs, _, advantages = credited(trainer)
    assert advantages.tolist() == batch.scores.tolist()
    assert 0 < batch.scores.sum() < 8
    assert trainer.args.epsilon_high == 0.35 and trainer.args.delta == 3.0
    # The mean is over all tokens, those of rejected completions as well.
    assert inputs["num_items_in_batch"] == inputs["completion_mask"].sum()


def test_each_prompt_counts_the_same(build, monkeypatch, credited):
    trainer = gvm(build, prompt_weighting="prompt")
    batch, inputs, _, advantages = credited(trainer)
    tokens = inputs["completion_mask"].sum(dim=1)
    accepted = Counter(group for group, score in zip(trainer._groups, batch.scores, strict=True) if score)
    prompts = len(set(trainer._groups))
    for place, group in enumerate(trainer._groups):
        expected = tokens.sum() / (prompts * accepted[group] * tokens[place]) if batch.scores[place] else 0
        assert advantages[place].item() == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_of_raft_plus_plus(build, monkeypatch):
    """Two updates on one generation: the policy has moved, and ratios are clipped above 1.35."""
    trainer = gvm(build, num_iterations=2, steps=2, beta=0.0)
    losses = record_losses(trainer, monkeypatch)
    trainer.train()
    moved = losses[-1]["inputs"]
    logps = moved["old_per_token_logps"] + torch.linspace(-0.5, 0.5, moved["old_per_token_logps"].size(1))
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (logps, torch.zeros_like(logps), None)
    )
    loss = trainer._compute_loss(trainer.model, moved)
    ratio, mask = (logps - moved["old_per_token_logps"]).exp(), moved["completion_mask"]
    accepted = (moved["advantages"] > 0)[:, None]
    expected = -(torch.min(ratio, ratio.clamp(0.8, 1.35)) * accepted * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradient_norms_are_those_of_the_embeddings(build):
    trainer = gvm(build)
    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
    norms = trainer._budget._norms(trainer, prompts, completions, [True, False])
    model = trainer.model
    ids = torch.tensor([prompts[0] + completions[0]])
    logits = model(ids).logits[0, 2:4] / trainer.temperature
    logits.log_softmax(-1).gather(1, torch.tensor(completions[0])[:, None]).sum().backward()
    assert norms == [pytest.approx(model.get_input_embeddings().weight.grad.norm().item(), rel=1e-5), 0.0]


def test_frozen_embeddings_have_gradients_for_the_estimate_alone(build):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = gvm(build, trainer_options={"peft_config": lora})
    before = trainer.model.get_input_embeddings().weight.clone()
    trainer.train()
    assert trainer.state.log_history[0]["budget/grad_norm"] > 0
    weight = trainer.model.get_input_embeddings().weight
    assert not weight.requires_grad and weight.grad is None
    torch.testing.assert_close(weight, before)


def test_without_a_solved_prompt_all_get_the_same(build, caplog):
    trainer = gvm(build, trainer_options={"reward_funcs": lambda completions, **_: [0.0] * len(completions)})
    trainer.train()
    assert sorted(Counter(trainer._groups).values()) == [4, 4]
    assert "No prompt of 4 has a budget" in caplog.text
    assert trainer.state.log_history[0]["budget/zero_frac"] == 0


def test_an_estimate_without_gradients(build):
    trainer = gvm(
        build,
        ratio_by="accept_rate",
        trainer_options={"reward_funcs": lambda completions, **_: [1.0] * len(completions)},
    )
    trainer.train()
    assert trainer.state.log_history[0]["budget/grad_norm"] == 1


def rows_of(trainer):
    seen, original = [], trainer.choose_rows

    def recording(batch):
        rows = original(batch)
        seen.append([row["prompt"][-1]["content"] for row in rows])
        return rows

    trainer.choose_rows = recording
    return seen


def test_a_resumed_run_goes_on_with_its_budget(build):
    whole = gvm(build, steps=3)
    expected = rows_of(whole)
    whole.train()
    begun = gvm(build, steps=3, save_strategy="steps", save_steps=1)
    begun.args.max_steps = 1
    begun.train()
    resumed = gvm(build, steps=3)
    seen = rows_of(resumed)
    resumed.train(resume_from_checkpoint=str(Path(begun.args.output_dir) / "checkpoint-1"))
    assert seen == expected[1:]
    estimated = ["budget/mean" in logged for logged in whole.state.log_history if "loss" in logged]
    assert estimated == [True, False, True]


def test_prompts_come_from_permutations():
    epochs = [shuffled_indices(first, 10, 10, 3) for first in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))
    assert shuffled_indices(7, 6, 10, 3) == epochs[0][7:] + epochs[1][:3]
    assert shuffled_indices(8, 4, 10, None) == [8, 9, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "loss: 'ppo' is not known"),
        ({"ratio_by": "loss"}, "ratio_by: 'loss' is not known"),
        ({"rounding": "floor"}, "rounding: 'floor' is not known"),
        ({"estimate_samples": 0}, "estimate_samples: 0 is too small"),
        ({"filter_threshold": -1.0}, "filter_threshold: -1.0 is negative"),
        ({"length_reward": "kimi"}, "length_reward: 'kimi' compares"),
        ({"scale_rewards": "none"}, "scale_rewards: 'none' has no effect"),
        ({"prompt_weighting": "prompt", "loss_type": "grpo"}, "loss_type: 'grpo' is not a mean over tokens"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs: use_reentrant"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GVMConfig("x", bf16=False, use_cpu=True, **options)


def test_a_stream_is_refused(build):
    stream = testbed.load_dataset("easy").to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset: a IterableDataset cannot be read in any order"):
        gvm(build, train_dataset=stream)


@pytest.mark.parametrize(("zero_stage", "fsdp_version"), [(3, None), (0, 1), (0, 2)])
def test_sharded_embeddings_are_refused(zero_stage, fsdp_version):
    with pytest.raises(ValueError, match="ratio_by: 'gradient_norm' needs the gradient of a whole tensor"):
        check_whole_embeddings(zero_stage, fsdp_version)
    check_whole_embeddings(2, None)
