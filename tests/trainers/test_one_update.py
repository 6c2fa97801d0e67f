"""One update of each trainer, for `make test-fast`."""

import math

import pytest


@pytest.mark.parametrize(
    "method", ["grpo", "step_grpo", "sas", "seed_grpo", "nft", "spo", "critique_grpo", "gvm", "spae"]
)
def test_an_update_moves_the_weights(build, method, mixed_problems):
    few = {"spo": {"value_samples": 1, "max_segments": 2}, "spae": {"probe_samples": 1, "max_probes": 2}}
    options = few.get(method, {})
    trainer = build(method, train_dataset=mixed_problems, learning_rate=1e-3, max_completion_length=160, **options)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert math.isfinite(logged["loss"]) and 0 <= logged["rewards/math_accuracy_reward/mean"] <= 1
    assert method == "grpo" or any(name.startswith(f"{trainer.metric_prefixes[0]}/") for name in logged)
    assert max((old - new).abs().max() for old, new in zip(before, trainer.model.parameters())) > 1e-4
