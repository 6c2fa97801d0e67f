"""SEEDGRPOTrainer end to end on the testbed model."""

import pytest
import torch
from loss_records import full_logps

from step_trl import SEEDGRPOConfig
from step_trl.advantages import answer_clusters, seed_advantages, semantic_entropy


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.0},
        {},
        {"alpha": 0.5, "f": "focal", "gamma": 3.0, "entropy": "shannon"},
        {"alpha": 0.5, "f": "inverse", "estimator": "likelihood"},
    ],
    ids=lambda options: "+".join(map(str, options.values())) or "paper",
)
def test_groups_that_disagree_move_the_policy_less(build, mixed_problems, credited, options):
    trainer = build("seed_grpo", learning_rate=0.0, max_completion_length=240, train_dataset=mixed_problems, **options)
    batch, inputs, before, after = credited(trainer)
    clusters = answer_clusters(batch.completions, 4)
    logps = None
    if options.get("estimator") == "likelihood":
        mask = inputs["completion_mask"]
        logps = (full_logps(trainer, inputs) * mask).sum(1) / mask.sum(1)
    how = {name: options[name] for name in ("estimator", "entropy") if name in options}
    entropy = semantic_entropy(clusters, 4, logps, **how)
    assert entropy.max() > 0.1
    factor = {name: options[name] for name in ("alpha", "f", "gamma") if name in options}
    torch.testing.assert_close(after, seed_advantages(before, entropy, 4, **factor), rtol=1e-4, atol=1e-6)
    correct = batch.correct.view(2, 4).float()
    torch.testing.assert_close(before, (correct - correct.mean(1, keepdim=True)).flatten())  # Dr.GRPO's
    logs = trainer.state.log_history[0]
    assert logs["seed/entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert logs["seed/clusters"] == (clusters.view(2, 4).amax(1) + 1).float().mean()
    assert 0 < logs["seed/scale"] < 1


def test_an_evaluation_has_groups_of_one(build, mixed_problems):
    trainer = build(
        "seed_grpo",
        trainer_options={"eval_dataset": mixed_problems.select(range(2))},
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        max_completion_length=40,
    )
    assert "eval_reward" in trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha: -0.1 is negative"),
        ({"f": "square"}, "f: 'square' is not known. Set one of 'linear', 'exponential', 'focal', 'inverse'"),
        ({"estimator": "nli"}, "estimator: 'nli' is not known"),
        ({"entropy": "renyi"}, "entropy: 'renyi' is not known"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SEEDGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_it_is_dr_grpo_where_alpha_is_0(build, mixed_problems):
    options = {"optim": "sgd", "learning_rate": 1.0, "max_completion_length": 200, "train_dataset": mixed_problems}
    weights = []
    for method, own in (
        ("seed_grpo", {"alpha": 0.0}),
        ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ):
        trainer = build(method, **options, **own)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    for ours, theirs in zip(*weights, strict=True):
        assert torch.equal(ours, theirs)
