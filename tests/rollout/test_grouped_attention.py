"""Attention of single queries that reads shared keys once, compared with transformers'."""

import pytest
import torch
from tiny_models import build_model, random_prompts, reference
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from step_trl.rollout.engines import grouped_attention
from step_trl.rollout.engines.grouped_attention import reading_shared_keys_once


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_it_attends_as_sdpa(key_heads, queries, kind):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(shape) for shape in ((5, 6, queries, 8), (5, key_heads, 7, 8), (5, key_heads, 7, 4))
    )
    seen = torch.rand(5, 1, queries, 7) < 0.6
    seen[..., 0] = True
    mask = None if kind is None else seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -1e9)
    module = torch.nn.Module()
    module.num_key_value_groups = 6 // key_heads
    options = {"scaling": 0.3, "dropout": 0.0}
    found, weights = grouped_attention.grouped_attention(module, query, key, value, mask, **options)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    assert weights is None and found.shape == (5, queries, 6, 4)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def passed_on(monkeypatch):
    """The numbers of queries of the calls that are passed on to transformers."""
    calls = []

    def recording(module, query, *args, **kwargs):
        calls.append(query.size(2))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", recording)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recording)
    return calls


def test_generate_reads_shared_keys_once(passed_on):
    model, prompts = build_model("llama"), random_prompts(4)
    expected = [reference(model, prompt, 12) for prompt in prompts]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True, padding_side="left").long()
    passed_on.clear()
    with reading_shared_keys_once(), reading_shared_keys_once():
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert output[:, ids.size(1) :].tolist() == expected
    assert passed_on == [ids.size(1)] * 2  # the prompts, in two layers
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not grouped_attention.grouped_attention


def test_an_implementation_of_others_is_left_alone(monkeypatch):
    def other(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", other)
    with reading_shared_keys_once():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
