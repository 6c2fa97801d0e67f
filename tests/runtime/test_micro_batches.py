"""Sorting and trimming micro-batches saves padding and changes no gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainers.ways_of_use import letters, moe

from step_trl import testbed
from step_trl.runtime import micro_batches
from step_trl.runtime.micro_batches import sort_by_length, trim_padding


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
                "tool_mask": mask.clone(),
                "token_type_ids": torch.cat([prompt_mask * numbers[:, None], torch.zeros_like(mask)], dim=1),
                "image_sizes": torch.full((len(rows), width), 8),  # no tokens, though of their shape
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
    st.sampled_from([None, 1, 2, 4]),
)
def test_rows_stay_whole_and_in_their_update(lengths, per_update, multiple):
    lengths = lengths[: len(lengths) // per_update * per_update] or lengths[:1] * per_update
    batches = make_batches(lengths, 9)
    result = [trim_padding(batch, multiple) for batch in sort_by_length(batches, per_update)]
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
            kinds = torch.cat(
                [batch["prompt_mask"][place] * number, torch.zeros_like(batch["completion_mask"][place])]
            )
            assert torch.equal(batch["token_type_ids"][place], kinds)
        assert batch["image_sizes"].size(1) == 9
        assert batch["tool_mask"].shape == batch["completion_ids"].shape == batch["completion_mask"].shape
        for kind, whole in (("prompt", 7), ("completion", 9)):
            longest = max(1, int(batch[f"{kind}_mask"].sum(dim=1).max()))
            least = next(size for size in range(longest, longest + 4) if size % (multiple or 1) == 0)
            assert batch[f"{kind}_ids"].size(1) == min(whole, least)


def cut_completions(trainer):
    """Cut sampled completions to lengths from 6 to 48 tokens. The model's own differ only in long ones."""
    generate = trainer._generate_single_turn

    def cutting(prompt_ids, *arguments):
        ids, logprobs = generate(prompt_ids, *arguments)
        lengths = [6 + 17 * number % 43 for number in range(len(ids))]
        return tuple(rows and [row[:length] for row, length in zip(rows, lengths)] for rows in (ids, logprobs))

    trainer._generate_single_turn = cutting


@pytest.mark.parametrize(
    ("method", "loss_type"),
    [("step_grpo", "dapo"), ("step_grpo", "grpo"), ("sas", "dapo"), ("sas", "grpo"), ("sas", "luspo")],
)
def test_the_update_is_the_same(build, easy_problems, method, loss_type):
    parameters, widths = [], []
    for sort in (False, True):
        trainer = build(
            method,
            reduce_padding=sort,
            loss_type=loss_type,
            train_dataset=easy_problems,
            trainer_options={"reward_funcs": letters},
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_completion_length=48,
            optim="sgd",
            learning_rate=1.0,
        )
        compute_loss, width = trainer._compute_loss, []

        def recording(model, inputs, compute_loss=compute_loss, width=width):
            width.append(inputs["completion_ids"].size(1))
            return compute_loss(model, inputs)

        trainer._compute_loss = recording
        cut_completions(trainer)
        trainer.train()
        parameters.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        widths.append(sum(width))
    start = torch.cat([p.detach().flatten() for p in build(method).model.parameters()])
    assert (parameters[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(parameters[0], parameters[1], atol=2e-6, rtol=0)
    assert widths[1] < widths[0]


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"entropy_coef": 0.05}, testbed.load_model),
        ({"top_entropy_quantile": 0.3}, testbed.load_model),
        ({"loss_type": "bnpo"}, testbed.load_model),
        ({}, moe),
    ],
    ids=["entropy bonus", "entropy quantile", "bnpo", "experts"],
)
def test_where_a_micro_batch_has_a_mean_its_rows_stay(build, easy_problems, monkeypatch, options, model):
    """The update is TRL's, and another one if rows are sorted regardless."""
    updates = []
    for reduce, sort in ((False, False), (True, False), (True, True)):
        trainer = build(
            "grpo",
            model=model(),
            train_dataset=easy_problems,
            trainer_options={"reward_funcs": letters},
            reduce_padding=reduce,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_completion_length=48,
            optim="sgd",
            learning_rate=1.0,
            **options,
        )
        if sort:
            monkeypatch.setattr(micro_batches, "order_is_free", lambda trainer, batches: True)
        cut_completions(trainer)
        trainer.train()
        updates.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(updates[0], updates[1], atol=2e-6, rtol=0)
    assert (updates[2] - updates[0]).abs().max() > 1e-5
