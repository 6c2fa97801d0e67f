"""The inputs of TRL's loss, and the log-probabilities that it computes."""

import torch
from trl import GRPOTrainer


def record_losses(trainer, monkeypatch):
    """Record the inputs of the parent's loss: as given, and the advantages and reference after its forward pass."""
    records, original = [], GRPOTrainer._compute_loss

    def recording(self, model, inputs):
        record = {"inputs": dict(inputs)}
        loss = original(self, model, inputs)
        records.append(record | {"advantages": inputs["advantages"], "reference": inputs.get("ref_per_token_logps")})
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", recording)
    return records


def full_logps(trainer, inputs):
    with torch.no_grad():
        logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
    return logps
