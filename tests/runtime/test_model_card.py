"""The model card: TRL's text, and the options and metrics of the training."""

from pathlib import Path

import pytest
from trl import GRPOTrainer

from step_trl import SASConfig, StepGRPOConfig
from step_trl.runtime.model_card import FRAMEWORKS, describe_training


@pytest.mark.parametrize(
    ("method", "name", "paper", "options", "rows"),
    [
        (
            "step_grpo",
            "Step-GRPO",
            "2604.16890",
            {"step_penalty": 0.25},
            {"step_penalty": "0.25", "triggers": "('Wait', 'Alternatively')", "step_grpo/steps/mean": None},
        ),
        (
            "sas",
            "SAS",
            "2604.24003",
            {"length_reward": "kimi"},
            {"selection_ratio": "0.3", "length_reward": "'kimi'", "sas/steps/mean": None, "num_generations": "4"},
        ),
    ],
)
def test_a_checkpoint_has_a_card(method, name, paper, options, rows, build):
    trainer = build(method, save_strategy="steps", save_steps=1, max_completion_length=64, **options)
    trainer.train()
    path = Path(trainer.args.output_dir) / "README.md"
    card = path.read_text()
    GRPOTrainer.create_model_card(trainer, model_name=method)
    original = path.read_text()

    # TRL's text stays, with method and paper.
    assert f"trained with {name}, a method introduced in [" in original and f"papers/{paper}" in original
    assert f"eprint       = {{arXiv:{paper}}}" in original
    before, after = original.split(FRAMEWORKS)
    assert card.startswith(before.rstrip()) and card.endswith(FRAMEWORKS + after)

    added = card[len(before.rstrip()) : card.index(FRAMEWORKS)]
    found = dict(line.strip("|` ").split("` | `") for line in added.splitlines() if line.startswith("| `"))
    assert rows.keys() <= found.keys()
    assert all(value is None or found[key] == value for key, value in rows.items())
    last = trainer.state.log_history[0]
    assert float(found["reward"]) == pytest.approx(last["reward"], rel=1e-3)
    assert "weight_sync_dir" not in found and "vllm_server_base_url" not in found and "step_time" not in found

    # Where it was written before, it is written anew.
    trainer.create_model_card(model_name=method)
    assert path.read_text() == card


def test_a_card_without_metrics_or_known_headings(tmp_path):
    args = StepGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, answer_prompt="a\nb|c")
    card = describe_training("TRL's", args, args.method_options(), (), [])
    assert card.startswith("TRL's\n\n### Hyperparameters\n\n| option | value |\n|---|---|\n")
    assert "Last metrics" not in card
    assert r"| `answer_prompt` | `'a\nb\|c'` |" in card


def test_evaluation_is_a_table_of_its_own(tmp_path):
    history = [
        {"step": 3, "reward": 0.5, "sas/steps/mean": None},
        {"step": 2, "eval_reward": 0.25, "eval_runtime": 1.0},
    ]
    args = SASConfig(str(tmp_path), bf16=False)
    card = describe_training(f"# Card\n\n{FRAMEWORKS}\n", args, args.method_options(), ("sas",), history)
    head = "\n\n| metric | value |\n|---|---|\n"
    assert f"### Last metrics in training, step 3{head}| `reward` | `0.5` |\n\n" in card
    assert f"### Last metrics in evaluation, step 2{head}| `eval_reward` | `0.25` |\n\n" in card
    assert card.endswith(f"\n\n{FRAMEWORKS}\n")
