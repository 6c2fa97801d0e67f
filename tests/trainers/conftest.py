"""The testbed, once per session, and a short way to build a trainer."""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch
from small_runs import SMALL_RUN
from transformers import GenerationMixin

from step_trl import testbed
from step_trl.trainers import METHODS


OPTIONS = SMALL_RUN | {
    "learning_rate": 1e-4,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 64,
    "seed": 1,
}


@pytest.fixture(scope="session")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="session")
def easy_problems():
    return testbed.load_dataset("easy")


@pytest.fixture(scope="session")
def mixed_problems():
    """Problems of which the model solves about half in 240 tokens: groups are mixed."""
    return testbed.load_dataset("medium")


@pytest.fixture(scope="session")
def remembered_generate():
    """
    `GenerationMixin.generate` that remembers what it has sampled. Trainings that differ only in their loss begin with
    the same weights, prompts, options and state of the random numbers, and so with the same completions.
    """
    generate, known = GenerationMixin.generate, {}

    @functools.wraps(generate)
    def remembering(self, **options):
        tensors = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
        digest = hashlib.blake2b()
        for tensor in (torch.get_rng_state(), *self.state_dict().values(), *tensors.values()):
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        others = {name: str(value) for name, value in options.items() if name not in tensors}
        key = digest.digest(), str(self.config), *tensors, *others.items()
        if key not in known:
            known[key] = generate(self, **options), torch.get_rng_state()
        output, state = known[key]
        torch.set_rng_state(state)
        return output.clone()

    return remembering


@pytest.fixture
def build(tmp_path, tokenizer, easy_problems, remembered_generate, monkeypatch):
    """`build("sas", selection_ratio=0.5)`: a trainer on the testbed's easy problems."""

    monkeypatch.setattr(GenerationMixin, "generate", remembered_generate)

    def build(method: str, *, model=None, train_dataset=None, trainer_options=None, **options):
        trainer_class, config_class = METHODS[method]
        return trainer_class(
            testbed.load_model() if model is None else model,
            args=config_class(str(tmp_path / method), **OPTIONS | options),
            train_dataset=easy_problems if train_dataset is None else train_dataset,
            **{"processing_class": tokenizer} | (trainer_options or {}),
        )

    return build


@pytest.fixture
def credited(monkeypatch):
    """`credited(trainer)` trains for an update; returns the batch, its inputs, and advantages before and after."""

    def credited(trainer):
        records, original = [], trainer.credit

        def recording(batch, advantages):
            inputs, before = dict(batch.inputs), advantages.clone()
            after = original(batch, advantages)
            records.append((batch, inputs | batch.inputs, before, after))
            return after

        monkeypatch.setattr(trainer, "credit", recording)
        trainer.train()
        (only,) = records
        return only

    return credited
