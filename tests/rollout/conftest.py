"""Fixtures for the tests of the in-process engine."""

from __future__ import annotations

import pytest
from rollout.tiny_models import build_model
from small_tokenizers import trained

from step_trl.rollout.engines import TransformersEngine


@pytest.fixture(scope="module")
def tokenizer():
    return trained()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, eos_token_ids=())


@pytest.fixture
def batch_sizes(model):
    """The number of rows of each forward."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    yield sizes
    hook.remove()
