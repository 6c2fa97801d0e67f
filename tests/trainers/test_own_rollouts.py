"""Methods with their own rollouts, with LoRA: a run that is resumed ends where an uninterrupted one does."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from step_trl.trainers import METHODS


def odd(completions, **_):
    """A verdict that differs between the completions of a prompt, so that a few tokens are enough."""
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("spo", {"value_samples": 2, "max_segments": 1, "max_completion_length": 160}),
        (
            "spo",
            {
                "structure": "tree",
                "branching": [2, 2],
                "segment_tokens": 30,
                "edges_per_question": 3,
                "max_completion_length": 160,
            },
        ),
        ("critique_grpo", {"refine_when": "always"}),
        ("gvm", {"estimate_samples": 2, "generations_per_estimate": 2, "max_steps": 3}),
        ("spae", {"probe_samples": 2, "max_probe_tokens": 3, "max_completion_length": 64}),
    ],
    ids=["chain", "tree", "critique", "gvm", "spae"],
)
def test_resumes_with_an_adapter(build, method, options):
    def run(**more):
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        trainer = build(
            method, trainer_options={"peft_config": lora, "reward_funcs": odd}, learning_rate=1e-3,
            **{"max_completion_length": 24, "max_steps": 2} | options | more,
        )  # fmt: skip
        torch.manual_seed(0)
        return trainer

    whole = run(save_strategy="steps", save_steps=1)
    start = {name: value.detach().clone() for name, value in whole.model.named_parameters()}
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))

    final, found = dict(whole.model.named_parameters()), dict(resumed.model.named_parameters())
    moved = [name for name, value in final.items() if (value - start[name]).abs().max() > 1e-5]
    assert moved and all("lora_" in name for name in moved)
    for name in moved:
        torch.testing.assert_close(found[name], final[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("method", "options", "tokens"),
    [
        ("grpo", {}, {"completions": 80}),
        ("spo", {"value_samples": 2, "cut_interval": 4}, {"completions": 80, "values": 8 * (6 + 2) * 2}),
        (
            "spo", {"value_samples": 2, "cut_interval": 4, "max_segments": 1, "prompt_value": "rollout"},
            {"completions": 80, "values": (8 * 6 + 2 * 10) * 2},
        ),
        (
            "spo", {"structure": "tree", "branching": [2, 3], "segment_tokens": 4, "per_device_train_batch_size": 4},
            {"trees": 2 * (2 * 4 + 6 * 6)},
        ),
        ("critique_grpo", {}, {"completions": 80, "refinements": 80}),
        (
            "critique_grpo", {"critique": "self", "max_critique_length": 7},
            {"completions": 80, "refinements": 80, "critiques": 56},
        ),
        ("gvm", {"estimate_samples": 3}, {"completions": 80, "estimates": 2 * 3 * 10}),
        ("spae", {"probe_samples": 2, "max_probe_tokens": 3}, {"completions": 80, "probes": 8 * 10 * 2 * 3}),
        ("spae", {"max_probes": 2}, {"completions": 80, "probes": 8 * 2 * 5 * 10}),
    ],
)  # fmt: skip
def test_the_most_tokens_of_a_generation(method, options, tokens):
    config = METHODS[method][1]("x", num_generations=4, max_completion_length=10, bf16=False, use_cpu=True, **options)
    assert config.most_sampled_tokens(8) == tokens
