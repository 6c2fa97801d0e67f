"""CritiqueGRPOTrainer end to end on the testbed model."""

import pytest
import torch
from loss_records import full_logps, record_losses

from step_trl import CritiqueGRPOConfig, CritiqueGRPOTrainer, testbed
from step_trl.losses import reshaped_policy_loss
from step_trl.trainers.critics import Critics


LENGTH = {"max_completion_length": 120, "num_generations": 4, "learning_rate": 0.0}


def rewarding(*verdicts):
    """A reward function: in its n-th call, the n-th of `verdicts` for all completions, or one for each."""
    calls = iter(verdicts)

    def reward(completions, **_):
        values = next(calls)
        return values if isinstance(values, list) else [float(values)] * len(completions)

    return reward


@pytest.fixture
def sampled(monkeypatch):
    """The prompts of each round of rollouts."""
    rounds, original = [], CritiqueGRPOTrainer.run_rollouts

    def recording(self, prompts, *args, **kwargs):
        rounds.append([list(prompt) for prompt in prompts])
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(CritiqueGRPOTrainer, "run_rollouts", recording)
    return rounds


def test_a_refinement_joins_a_group_that_has_failed(build, sampled, monkeypatch, tokenizer):
    right = [0.0, 0.0, 1.0, 0.0] + [0.0] * 4  # the second group fails, and its third refinement is correct
    reward = rewarding(right, [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    trainer = build("critique_grpo", trainer_options={"reward_funcs": reward}, **LENGTH)
    losses = record_losses(trainer, monkeypatch)
    trainer.train()

    assert [len(prompts) for prompts in sampled] == [8, 4]
    texts = tokenizer.batch_decode(sampled[1])
    rows = trainer.batch.rows
    assert all(rows[4]["prompt"][-1]["content"] in text for text in texts)
    assert all(f"incorrect. The correct answer is {rows[4]['solution']}." in text for text in texts)

    # A group of three completions and a refinement, whose advantages are rewards less their mean.
    (record,) = losses
    inputs = record["inputs"]
    assert inputs["refined"].tolist().count(True) == 1
    place = inputs["refined"].tolist().index(True)
    assert inputs["advantages"][place].item() == pytest.approx(0.75)
    ids = inputs["completion_ids"][place][inputs["completion_mask"][place].bool()].tolist()
    assert ids == trainer.batch.completion_ids[4]
    assert inputs["sampling_per_token_logps"][place][: len(ids)].isnan().all()
    prompt = inputs["prompt_ids"][place][inputs["prompt_mask"][place].bool()].tolist()
    assert prompt == sampled[0][4]  # the question alone

    logged = trainer.state.log_history[0]
    assert logged["critique/refined_frac"] == 0.5 and logged["critique/refined_correct"] == 1.0
    mask = inputs["completion_mask"][place].bool()
    probabilities = full_logps(trainer, inputs)[place][mask].exp()
    assert logged["critique/offpolicy_prob"] == pytest.approx(probabilities.mean().item(), rel=1e-4)


def test_the_gradient_is_that_of_both_losses(build, monkeypatch):
    reward = rewarding([0.0] * 8, [1.0] * 8, [1.0, 0.0, 0.0, 0.0] * 2)
    trainer = build(
        "critique_grpo", trainer_options={"reward_funcs": reward}, num_iterations=2, refinement_weight=3.0,
        reduce_padding=False, **LENGTH,
    )  # fmt: skip
    losses = record_losses(trainer, monkeypatch)
    trainer.train()
    inputs = losses[0]["inputs"]
    refined, mask = inputs["refined"], inputs["completion_mask"]
    assert refined.sum() == 2

    logps, old = full_logps(trainer, inputs), inputs["old_per_token_logps"]
    shifted = (logps + 0.3 * torch.linspace(-1, 1, logps.size(1))).clamp(max=0)  # a policy that has moved
    copy = dict(inputs)
    trainer.before_loss(copy, shifted)
    leaf = shifted.clone().requires_grad_()
    ratio = (leaf - copy["old_per_token_logps"]).exp()
    advantages = copy["advantages"]
    clipped = ratio.clamp(0.8, 1.2)
    (-torch.min(ratio * advantages, clipped * advantages) * mask).sum().backward()  # as TRL computes it

    expected = shifted.clone().requires_grad_()
    plain, of = (expected - old).exp(), inputs["advantages"][:, None]
    initial = -torch.min(plain * of, plain.clamp(0.8, 1.2) * of)
    loss = torch.where(refined[:, None], 3.0 * reshaped_policy_loss(expected, inputs["advantages"]), initial)
    (loss * mask).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "verdicts", "rounds"),
    [
        ({}, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [8]),
        ({"refine_when": "always"}, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [8, 8]),
        ({"refinement_selection": "first"}, [0.0] * 8, [8, 8]),
    ],
)
def test_which_groups_are_refined(build, sampled, options, verdicts, rounds):
    trainer = build("critique_grpo", trainer_options={"reward_funcs": rewarding(verdicts, 0, 0)}, **LENGTH | options)
    trainer.train()
    assert [len(prompts) for prompts in sampled] == rounds
    logged = trainer.state.log_history[0]
    assert logged["critique/refined_frac"] == len(rounds) - 1
    assert trainer._refined.tolist() == [len(rounds) > 1, False, False, False] * 2


def test_a_critique_that_contradicts_the_reward_is_replaced(build, sampled, tokenizer):
    """The testbed's model writes no verdicts: with its own critiques, all are replaced."""
    trainer = build(
        "critique_grpo", trainer_options={"reward_funcs": rewarding(0, 0, 0)}, critique="self", max_critique_length=8,
        **LENGTH,
    )  # fmt: skip
    trainer.train()
    assert [len(prompts) for prompts in sampled] == [8, 8, 8]
    assert all("Verdict: incorrect" in text for text in tokenizer.batch_decode(sampled[1]))
    assert all("The correct answer is" in text for text in tokenizer.batch_decode(sampled[2]))
    assert trainer.state.log_history[0]["critique/agreed"] == 0


def test_critiques_of_an_endpoint_are_used_where_they_agree(build, sampled, tokenizer, monkeypatch):
    answers = iter(["Step 1 is wrong. Verdict: incorrect", "Fine. Verdict: correct", *["no verdict"] * 6])
    asked = []

    async def ask(self, client, content):
        asked.append(content)
        return next(answers)

    monkeypatch.setattr("step_trl.evaluation.chat.ChatClient.ask", ask)
    trainer = build(
        "critique_grpo", trainer_options={"reward_funcs": rewarding(0, 0, 0)}, critique="cot",
        critic_url="http://127.0.0.1:9", critic_model="critic", **LENGTH,
    )  # fmt: skip
    trainer.train()
    assert len(asked) == 8 and all("The reference solution:" in content for content in asked)
    texts = tokenizer.batch_decode(sampled[1])
    assert ["Step 1 is wrong" in text for text in texts] == [True, *[False] * 7]
    assert ["The correct answer is" in text for text in texts] == [False, *[True] * 7]
    assert trainer.state.log_history[0]["critique/agreed"] == 1 / 8


def test_a_solution_that_is_too_long_loses_its_beginning(build, sampled, tokenizer):
    trainer = build(
        "critique_grpo", trainer_options={"reward_funcs": rewarding(0, 0, 0)}, max_refinement_prompt_length=230,
        **LENGTH,
    )  # fmt: skip
    trainer.train()
    assert max(map(len, sampled[1])) <= 232
    assert any("…" in text for text in tokenizer.batch_decode(sampled[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critique": "gpt"}, "critique: 'gpt' is not known"),
        ({"refine_when": "never"}, "refine_when: 'never' is not known"),
        ({"critique": "cot"}, "critic_url: critique='cot' with critic_url=None"),
        ({"critic_url": "http://x"}, "critic_url: critique='indicative_gt' with critic_url='http://x'"),
        ({"refinement_gamma": 0.0}, "refinement_gamma: 0.0 is not positive"),
        ({"loss_type": "cispo"}, "loss_type: 'cispo' gives advantages another gradient"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CritiqueGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_rows_without_a_solution_are_refused(build):
    rows = testbed.load_dataset("easy").select(range(8)).remove_columns("solution")
    with pytest.raises(ValueError, match="critique: 'indicative_gt' needs a column `solution`"):
        build("critique_grpo", trainer_options={"reward_funcs": rewarding(0)}, train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_completion_length": 1000}, "max_completion_length: 1000 tokens leave 0 of 1000 for the prompt"),
        ({"critique": "self"}, "max_critique_length: 1024 tokens leave -24 of 1000"),
    ],
)
def test_a_context_without_room_for_refinements_is_refused(options, message):
    args = CritiqueGRPOConfig("x", bf16=False, use_cpu=True, **options)
    with pytest.raises(ValueError, match=message):
        Critics(args, 1000)
