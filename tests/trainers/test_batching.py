"""Sorting and trimming micro-batches saves padding and changes no gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_trl.trainers.batching import sort_by_length, trim_padding


def make_batches(lengths: list[list[int]], width: int):
    """Micro-batches as TRL makes them: left-padded prompts, right-padded completions; a row holds its own number."""
    batches, number = [], 0
    for rows in lengths:
        numbers = torch.arange(number, number + len(rows))
        number += len(rows)
        mask = (torch.arange(width) < torch.tensor(rows)[:, None]).long()
        prompt_mask = (torch.arange(7) >= 7 - (1 + numbers % 4)[:, None]).long()
        batches.append(
            {
                "prompt_ids": prompt_mask * (1000 + numbers[:, None]),
                "prompt_mask": prompt_mask,
                "completion_ids": mask * (1 + numbers[:, None]),
                "completion_mask": mask,
                "advantages": numbers.float(),
                "num_items_in_batch": torch.tensor(5),
                "ref_per_token_logps": None,
            }
        )
    return batches


@given(
    st.integers(1, 3).flatmap(
        lambda rows: st.lists(st.lists(st.integers(0, 9), min_size=rows, max_size=rows), min_size=2, max_size=6)
    ),
    st.integers(1, 3),
)
def test_rows_stay_whole_and_in_their_update(lengths, per_update):
    lengths = lengths[: len(lengths) // per_update * per_update] or lengths[:1] * per_update
    batches = make_batches(lengths, 9)
    result = [trim_padding(batch) for batch in sort_by_length(batches, per_update)]
    assert len(result) == len(batches)
    for start in range(0, len(batches), per_update):
        before, after = batches[start : start + per_update], result[start : start + per_update]
        numbers = torch.cat([batch["advantages"] for batch in after])
        assert sorted(numbers.tolist()) == torch.cat([batch["advantages"] for batch in before]).tolist()
        sizes = torch.cat([batch["completion_mask"].sum(dim=1) for batch in after]).tolist()
        assert sizes == sorted(sizes)
    rows = [length for update in lengths for length in update]
    for batch in result:
        assert batch["num_items_in_batch"] == 5 and batch["ref_per_token_logps"] is None
        for place, number in enumerate(batch["advantages"].int().tolist()):
            assert batch["completion_mask"][place].sum() == rows[number]
            assert batch["completion_ids"][place].tolist().count(1 + number) == rows[number]
            assert batch["prompt_ids"][place].tolist().count(1000 + number) == 1 + number % 4
        assert batch["completion_ids"].size(1) == max(1, batch["completion_mask"].sum(dim=1).max())


@pytest.mark.parametrize("method", ["step_grpo", "sas"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_update_is_the_same(build, mixed_problems, method, loss_type):
    parameters, widths = [], []
    for sort in (False, True):
        trainer = build(
            method,
            sort_by_length=sort,
            loss_type=loss_type,
            train_dataset=mixed_problems,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_completion_length=320,
            optim="sgd",
            learning_rate=1.0,
        )
        compute_loss, width = trainer._compute_loss, []

        def recording(model, inputs, compute_loss=compute_loss, width=width):
            width.append(inputs["completion_ids"].size(1))
            return compute_loss(model, inputs)

        trainer._compute_loss = recording
        trainer.train()
        parameters.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        widths.append(sum(width))
    start = torch.cat([p.detach().flatten() for p in build(method).model.parameters()])
    assert (parameters[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(parameters[0], parameters[1], atol=2e-6, rtol=0)
    assert widths[1] < widths[0]
