"""Trainings on questions about pictures: truncated rollouts, recorded rollouts, and pairs of them."""

import pytest
import torch
from small_runs import SMALL_RUN, every_other
from tiny_llava import pictures, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from step_trl import SGRPOConfig, SGRPOTrainer, StepGRPOConfig, StepGRPOTrainer
from step_trl.cli.arguments import PreferenceConfig
from step_trl.preferences import RolloutDPOTrainer, RolloutVerifier, preference_pairs, read_rollouts, visual_pairs
from step_trl.preferences.records import images_key
from step_trl.rollout import AnswerConsistency, TokenBudget


OPTIONS = SMALL_RUN | {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def rows():
    return pictures(2, images=2)


@pytest.fixture(scope="module")
def trained(folder, rows, tmp_path_factory):
    """Step-GRPO after an update in which its rollouts were recorded. They are probed, and end after 12 tokens."""
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    trainer = StepGRPOTrainer(
        folder,
        every_other,
        args=StepGRPOConfig(str(tmp_path_factory.mktemp("run")), record_rollouts=True, **OPTIONS),
        train_dataset=rows,
        truncation_callbacks=[AnswerConsistency(tokenizer, every=5, max_probe_tokens=3), TokenBudget(tokenizer, 12)],
    )
    trainer.train()
    return trainer


def test_truncated_rollouts_see_the_pictures(trained, folder):
    """Their log-probabilities are those of a forward pass with pixels, with the weights that sampled."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    rollouts = trained.batch.rollouts
    assert all(rollout.probes for rollout in rollouts) and any(rollout.truncated for rollout in rollouts)
    for rollout, row in zip(rollouts[::4], trained.batch.rows[::4], strict=True):
        assert rollout.prompt_ids.count(model.config.image_token_id) == 8
        pixels = trained.processing_class.image_processor(row["images"], return_tensors="pt")["pixel_values"]
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits
        logps = logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        found = torch.tensor(rollout.logprobs, dtype=torch.float32)
        sampled = ~found.isnan()
        assert sampled.any()
        torch.testing.assert_close(found[sampled], expected[sampled], atol=1e-4, rtol=1e-4)


def test_pairs_keep_their_pictures(trained, folder, rows, tmp_path):
    rollouts = read_rollouts(trained.args.output_dir)
    assert set(rollouts["images"]) == {images_key(row) for row in rows} and rollouts["prompt"].nunique() == 1
    # Whatever the model says, one rollout of each group is clean, and the others are wrong.
    rollouts["correct"] = rollouts.groupby("group").cumcount() == 0
    rollouts[["truncated", "thought", "answer"]] = [False, "so red", "red"]
    pairs = preference_pairs(RolloutVerifier().verify(rollouts))
    assert len(pairs) == 2
    shown = visual_pairs(pairs, rows)
    for pair, row in zip(pairs.to_dict("records"), shown, strict=True):
        assert images_key(row) == pair["images"] and row["chosen"][0]["content"] == pair["chosen"]
    trainer = RolloutDPOTrainer(
        folder,
        args=PreferenceConfig(str(tmp_path), **SMALL_RUN | {"per_device_train_batch_size": 2}),
        train_dataset=shown,
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    trainer.train()
    (logged, *_) = trainer.state.log_history
    assert logged["loss"] == pytest.approx(0.6931471806, rel=1e-5) and logged["grad_norm"] > 0


def test_a_method_that_samples_without_images_refuses_them(folder, rows, tmp_path):
    with pytest.raises(ValueError, match="processing_class: the rollouts of this method are for text models"):
        SGRPOTrainer(folder, every_other, args=SGRPOConfig(str(tmp_path), **OPTIONS), train_dataset=rows)
