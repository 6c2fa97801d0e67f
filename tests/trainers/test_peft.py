"""LoRA adapters in both trainers: several iterations per batch, a KL term, and SAS selection."""

import pytest
import torch
from loss_records import record_losses
from peft import AutoPeftModelForCausalLM, LoraConfig

from step_trl import testbed


SELECTION = {
    "step_grpo": {"advantage_selection": {"selection_ratio": 0.5}},
    # Whatever the rewards are, this rule changes advantages.
    "sas": {"selection_ratio": 0.5, "failed_step_advantage": 1.0},
}


@pytest.fixture(params=["step_grpo", "sas"])
def trained(request, build, mixed_problems, monkeypatch):
    """A trainer after two updates on one batch of completions, its model's state before, and what its losses read."""
    trainer = build(
        request.param,
        # Not zero, as adapters are by default: the policy differs from its reference from the start.
        trainer_options={"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
        train_dataset=mixed_problems,
        max_steps=2,
        num_iterations=2,
        beta=0.1,
        max_completion_length=160,
        learning_rate=1e-3,
        **SELECTION[request.param],
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    return trainer, before, records


def token_logps(model, inputs):
    """Return the log-probabilities of a batch's completions under a model that TRL may not know."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -inputs["completion_ids"].size(1) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)


def test_lora(trained):
    trainer, before, (first, second) = trained
    history = [entry for entry in trainer.state.log_history if "loss" in entry]

    # Only the adapter is trained.
    after = trainer.model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {name for name in after if "lora_B" in name} <= moved

    # Both updates see the same completions, and the reference, which is the model without the adapter.
    inputs = second["inputs"]
    assert torch.equal(first["inputs"]["completion_ids"], inputs["completion_ids"])
    mask = inputs["completion_mask"].bool()
    reference = token_logps(testbed.load_model(), inputs)
    assert (inputs["ref_per_token_logps"] - reference)[mask].abs().max() < 1e-4
    assert (inputs["ref_per_token_logps"] - token_logps(trainer.model, inputs))[mask].abs().max() > 0.01
    assert all(entry["kl"] > 1e-3 for entry in history)

    # Advantages are per token, selected by the confidence of the policy that sampled.
    assert inputs["step_ids"].shape == second["advantages"].shape == mask.shape
    assert (second["advantages"] != inputs["advantages"][:, None])[mask].any()
    assert (inputs["old_per_token_logps"] - token_logps(trainer.model, inputs))[mask].abs().max() > 1e-3

    # The adapter is saved, and the reloaded policy is the trained one.
    trainer.save_model()
    reloaded = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype="float32")
    difference = token_logps(reloaded, inputs) - token_logps(trainer.model, inputs)
    assert difference[mask].abs().max() < 1e-5
