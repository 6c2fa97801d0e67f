"""Step-level selection against numbers worked by hand and against plain Python with exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl.advantages import select_step_advantages, step_confidences


NAN, INF = float("nan"), float("inf")


def reference_row(advantage, logps, steps, correct, ratio, failed_step_advantage, selection, granularity):
    """Select steps of one completion, with lists, `sorted` and fractions. `ratio` is a string, as written on paper."""
    ratio = Fraction(ratio)
    if granularity == "token":
        steps = [sum(step >= 0 for step in steps[:t]) if steps[t] >= 0 else -1 for t in range(len(steps))]
    confidence = {}
    for step in sorted({step for step in steps if step >= 0}):
        values = [Fraction(logp) for logp, owner in zip(logps, steps, strict=True) if owner == step]
        confidence[step] = sum(values) / len(values)
    order = sorted(confidence, key=lambda step: (confidence[step], step))
    if selection not in ("both", "correct" if correct else "failed"):
        chosen, value = [], None
    elif correct:
        chosen, value = order[: math.ceil(ratio * len(order))], 0.0
    elif failed_step_advantage == 0:
        chosen, value = order[len(order) - math.floor(ratio * len(order)) :], 0.0
    else:
        chosen, value = order[len(order) - math.ceil((1 - ratio) * len(order)) :], failed_step_advantage
    return [value if step in chosen else advantage for step in steps]


# Ten steps; in ascending order of confidence 9, 4, 0, 7, 2, 5, 1, 8, 3, 6.
TEN = [-0.7, -0.3, -0.5, -0.1, -0.8, -0.4, -0.05, -0.6, -0.2, -0.9]


def select(logps, steps, correct, advantage=2.0, **kwargs):
    """Select the steps of one row."""
    return select_step_advantages(
        torch.tensor([advantage]), torch.tensor([logps]), torch.tensor([steps]), torch.tensor([correct]), **kwargs
    )[0].tolist()


def changed(logps, correct, **kwargs):
    """Return the steps that change in a completion whose steps are one token each."""
    row = select(logps, list(range(len(logps))), correct, **kwargs)
    return [step for step, value in enumerate(row) if value != 2.0]


def test_confidences_by_hand():
    logps = torch.tensor([[-1.0, -3.0, -0.5, NAN], [-4.0, INF, -1.0, -1.0]])
    steps = torch.tensor([[0, 0, 1, -1], [0, -1, 2, 2]])
    confidences = step_confidences(logps, steps)
    torch.testing.assert_close(confidences, torch.tensor([[-2.0, -0.5, NAN], [-4.0, NAN, -1.0]]), equal_nan=True)


def test_confidences_without_steps_are_nan():
    assert step_confidences(torch.zeros(2, 3), torch.full((2, 3), -1)).isnan().tolist() == [[True], [True]]
    assert step_confidences(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 1)


def test_confidences_of_half_precision_are_summed_in_float32():
    logps = torch.full((1, 3000), -1.0, dtype=torch.bfloat16)
    confidences = step_confidences(logps, torch.zeros(1, 3000, dtype=torch.long))
    assert confidences.dtype == torch.float32
    assert confidences.tolist() == [[-1.0]]


@pytest.mark.parametrize(
    ("correct", "options", "expected"),
    [
        (True, {}, [0, 4, 9]),
        (True, {"ratio": 0.31}, [0, 4, 7, 9]),
        (True, {"ratio": 0.01}, [9]),
        (True, {"ratio": 0.7}, [0, 1, 2, 4, 5, 7, 9]),
        (True, {"ratio": 0.1 + 0.2}, [0, 4, 9]),
        (False, {}, [1, 2, 3, 5, 6, 7, 8]),
        (False, {"ratio": 0.7}, [3, 6, 8]),
        (False, {"ratio": 0.75}, [3, 6, 8]),
        (False, {"failed_step_advantage": 0.0}, [3, 6, 8]),
        (False, {"failed_step_advantage": 0.0, "ratio": 0.39}, [3, 6, 8]),
        (False, {"failed_step_advantage": 0.0, "ratio": 0.09}, []),
        (False, {"failed_step_advantage": 0.0, "ratio": 0.7}, [1, 2, 3, 5, 6, 7, 8]),
        (True, {"selection": "failed"}, []),
        (True, {"selection": "correct"}, [0, 4, 9]),
        (False, {"selection": "correct"}, []),
        (False, {"selection": "failed", "ratio": 0.7}, [3, 6, 8]),
        (True, {"selection_bug_compatible": True}, list(range(10))),
        (False, {"selection_bug_compatible": True}, []),
        (True, {"selection_bug_compatible": True, "selection": "failed"}, []),
    ],
)
def test_which_steps_change(correct, options, expected):
    assert changed(TEN, correct, **options) == expected


def test_values_on_tokens_by_hand():
    # confidences -2, -1, -4; the last two tokens are the answer and padding
    logps, steps = [-1.0, -3.0, -1.0, -4.0, NAN, INF], [0, 0, 1, 2, -1, -1]
    assert select(logps, steps, True) == [2.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    assert select(logps, steps, True, ratio=0.5) == [0.0, 0.0, 2.0, 0.0, 2.0, 2.0]
    assert select(logps, steps, False, advantage=-0.5) == [1.0, 1.0, 1.0, 1.0, -0.5, -0.5]
    assert select(logps, steps, False, advantage=-0.5, ratio=0.5) == [1.0, 1.0, 1.0, -0.5, -0.5, -0.5]
    assert select(logps, steps, False, advantage=-0.5, ratio=0.5, failed_step_advantage=0.0) == [
        *(-0.5, -0.5, 0.0),
        *(-0.5, -0.5, -0.5),
    ]
    assert select(logps, steps, False, advantage=-0.5, ratio=0.9, failed_step_advantage=0.25)[2] == 0.25


def test_equal_confidences_go_by_position():
    equal = [-0.5] * 4
    assert changed(equal, True, ratio=0.5) == [0, 1]
    assert changed(equal, False, ratio=0.5) == [2, 3]
    assert changed([-0.5, -1.0, -0.5, -1.0], True, ratio=0.7) == [0, 1, 3]
    assert changed([-0.5, -1.0, -0.5, -1.0], False, ratio=0.3) == [0, 2, 3]


def test_granularity_token_selects_single_tokens():
    logps, steps = [-1.0, -3.0, -2.0, -4.0, -9.0], [0, 0, 0, 1, -1]
    assert select(logps, steps, True, granularity="token", ratio=0.5) == [2.0, 0.0, 2.0, 0.0, 2.0]
    assert select(logps, steps, False, granularity="token", ratio=0.5) == [1.0, 2.0, 1.0, 2.0, 2.0]


def test_random_selects_as_many_steps_but_any():
    rows, steps = 2000, torch.arange(10).repeat(2000, 1)
    steps[: rows // 2, 5:] = -1  # half of the rows have five steps
    correct = torch.ones(rows, dtype=torch.bool)
    arguments = (torch.ones(rows), torch.linspace(-9, 0, 10).repeat(rows, 1), steps, correct)
    generator = torch.Generator().manual_seed(0)
    first = select_step_advantages(*arguments, criterion="random", generator=generator)
    assert (first == 0).sum(1).tolist() == [2] * (rows // 2) + [3] * (rows // 2)
    shares = (first[rows // 2 :] == 0).double().mean(0)
    assert ((shares - 0.3).abs() < 0.06).all()
    again = select_step_advantages(*arguments, criterion="random", generator=torch.Generator().manual_seed(0))
    other = select_step_advantages(*arguments, criterion="random", generator=generator)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (select_step_advantages(*arguments, criterion="random") == 0).sum() == (first == 0).sum()


def test_rows_without_steps_keep_their_advantage():
    advantages = torch.tensor([1.5, -1.5])
    steps = torch.full((2, 3), -1)
    for options in ({}, {"criterion": "random"}, {"granularity": "token"}, {"failed_step_advantage": 0.0}):
        result = select_step_advantages(
            advantages, torch.full((2, 3), NAN), steps, torch.tensor([True, False]), **options
        )
        assert result.tolist() == [[1.5] * 3, [-1.5] * 3]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0)])
def test_empty_batches(shape):
    result = select_step_advantages(
        torch.zeros(shape[0]), torch.zeros(shape), torch.zeros(shape, dtype=torch.long), torch.ones(shape[0]) > 0
    )
    assert result.shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_result_has_the_type_of_the_advantages_and_no_gradient(dtype):
    logps = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([0.5], dtype=dtype)
    for correct in (True, False):
        result = select_step_advantages(advantages, logps, torch.tensor([[0, 1, -1]]), torch.tensor([correct]))
        assert result.dtype == dtype
        assert not result.requires_grad


def test_correct_may_be_a_reward():
    arguments = (torch.ones(2), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.long))
    result = select_step_advantages(*arguments, torch.tensor([1.0, 0.0]), failed_step_advantage=3.0)
    assert result.tolist() == [[0.0], [3.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio: 0\.0"),
        ({"ratio": 1.0}, r"ratio: 1\.0"),
        ({"ratio": NAN}, "ratio: nan"),
        ({"selection": "right"}, "selection: 'right'.*'both', 'correct', 'failed'"),
        ({"criterion": "entropy"}, "criterion: 'entropy'"),
        ({"granularity": "word"}, "granularity: 'word'"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        select(TEN, list(range(10)), True, **options)


# Eighths: sums are exact in float32, so that ties are ties, and the mean is the correctly rounded quotient.
LOGPS = st.integers(-40, 0).map(lambda eighths: eighths / 8)


@st.composite
def rows(draw):
    """Log-probabilities, and steps that are contiguous but for masked tokens; the tail has none."""
    length = draw(st.integers(1, 24))
    logps = draw(st.lists(LOGPS, min_size=length, max_size=length))
    kinds = draw(st.lists(st.sampled_from("same same same same next next masked".split()), min_size=24, max_size=24))
    thought = draw(st.integers(0, length))
    steps, step = [], 0
    for token, kind in enumerate(kinds[:length]):
        step += kind == "next" and step in steps
        steps.append(step if kind != "masked" and token < thought else -1)
    return [NAN if step < 0 else logp for logp, step in zip(logps, steps)], steps


@settings(max_examples=300)
@given(
    st.lists(st.tuples(rows(), st.booleans(), st.integers(-4, 4)), min_size=1, max_size=4),
    st.integers(1, 99).map(lambda percent: f"{percent / 100:.2f}"),
    st.sampled_from([1.0, 0.0, 0.5]),
    st.sampled_from(["both", "correct", "failed"]),
    st.sampled_from(["step", "token"]),
)
def test_selection_equals_the_reference(batch, ratio, failed_step_advantage, selection, granularity):
    length = max(len(steps) for (_, steps), _, _ in batch)
    logps = [values + [INF] * (length - len(values)) for (values, _), _, _ in batch]
    steps = [values + [-1] * (length - len(values)) for (_, values), _, _ in batch]
    correct = [right for _, right, _ in batch]
    advantages = [eighths / 8 for _, _, eighths in batch]
    result = select_step_advantages(
        torch.tensor(advantages),
        torch.tensor(logps),
        torch.tensor(steps),
        torch.tensor(correct),
        float(ratio),
        failed_step_advantage,
        selection,
        granularity=granularity,
    )
    expected = [
        reference_row(advantage, row_logps, row_steps, right, ratio, failed_step_advantage, selection, granularity)
        for advantage, row_logps, row_steps, right in zip(advantages, logps, steps, correct, strict=True)
    ]
    assert result.tolist() == expected
