"""SPO's segments and advantages against the numbers of the formulas and against plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_trl.advantages import moments, segment_advantages, segment_boundaries, thin_boundaries, whiten
from step_trl.losses import uncertain_tokens


PROBABILITIES = (0.95, 0.5, 0.99, 0.8, 0.97, 0.6, 0.92, 0.99)


def masked(probabilities, advantages):
    mask = uncertain_tokens(torch.tensor(probabilities).log())
    return torch.where(mask, advantages, 0).tolist()


def test_a_cut_before_each_uncertain_token():
    boundaries = segment_boundaries(torch.tensor(PROBABILITIES), interval=1)
    assert boundaries == [0, 2, 4]
    advantages = segment_advantages(8, boundaries, (0.25, 0.5, 0.75), 1)
    assert advantages.tolist() == [0, *[0.25] * 7]
    assert masked(PROBABILITIES, advantages) == [0, 0.25, 0, 0.25, 0, 0.25, 0, 0]
    based = segment_advantages(8, boundaries, (0.25, 0.5, 0.75), 1, prompt_value=0.125)
    assert based.tolist() == [0.125, *[0.25] * 7]
    assert masked(PROBABILITIES, based) == masked(PROBABILITIES, advantages)


def test_a_cut_before_every_other_uncertain_token():
    boundaries = segment_boundaries(torch.tensor(PROBABILITIES), interval=2)
    assert boundaries == [0, 4]
    advantages = segment_advantages(8, boundaries, (0.25, 0.75), 0)
    assert advantages.tolist() == [0, *[0.5] * 4, *[-0.75] * 3]
    assert masked(PROBABILITIES, advantages) == [0, 0.5, 0, 0.5, 0, -0.75, 0, 0]


def test_a_cut_before_the_first_token_is_the_value_of_the_prompt():
    probabilities = (0.4, 0.95, 0.7, 0.93, 0.99)
    boundaries = segment_boundaries(torch.tensor(probabilities), interval=1)
    assert boundaries == [-1, 1]
    advantages = segment_advantages(5, boundaries, (0.5, 0.25), 1)
    assert advantages.tolist() == [-0.25, -0.25, 0.75, 0.75, 0.75]
    assert masked(probabilities, advantages) == [-0.25, 0, 0.75, 0, 0]
    mask = uncertain_tokens(torch.tensor(probabilities).log())
    whitened = whiten(advantages.double(), moments(advantages, mask))[mask]
    assert whitened.tolist() == pytest.approx([-0.7071067741, 0.7071067741], abs=1e-10)


def test_certain_completions_have_no_segments():
    assert segment_boundaries(torch.tensor([0.95, 0.99])) == []
    assert segment_advantages(2, [], [], 1).tolist() == [0, 0]


def test_the_threshold_itself_is_certain():
    probabilities = torch.tensor([0.9, 0.89], dtype=torch.float64)
    assert segment_boundaries(probabilities) == [0]
    assert segment_advantages(2, [0], [0.5], 1).tolist() == [0, 0.5]
    assert uncertain_tokens(probabilities.log()).tolist() == [False, True]


@given(st.data())
def test_advantages_equal_the_reference(data):
    length = data.draw(st.integers(1, 12))
    probabilities = data.draw(st.lists(st.floats(0.01, 1), min_size=length, max_size=length))
    interval, most = data.draw(st.integers(1, 4)), data.draw(st.none() | st.integers(1, 4))
    reward, prompt_value = data.draw(st.floats(-1, 1)), data.draw(st.none() | st.floats(-1, 1))
    uncertain = [index - 1 for index, probability in enumerate(probabilities) if probability < 0.9]
    boundaries = segment_boundaries(torch.tensor(probabilities, dtype=torch.float64), 0.9, interval)
    assert boundaries == [place for number, place in enumerate(uncertain) if number % interval == 0]
    thin = thin_boundaries(boundaries, most)
    assert set(thin) <= set(boundaries) and thin == sorted(set(thin))
    assert len(thin) == min(len(boundaries), most or length)
    assert thin[:1] == boundaries[:1]
    values = [data.draw(st.floats(-1, 1)) for _ in thin]
    advantages = segment_advantages(length, thin, values, reward, prompt_value)
    at = dict(zip(thin, values)) | {length - 1: reward}
    if prompt_value is not None:
        at.setdefault(-1, prompt_value)
    for token, advantage in enumerate(advantages.tolist()):
        before = [place for place in at if place < token]
        base = at[max(before)] if thin and before else None
        expected = 0 if base is None else at[min(place for place in at if place >= token)] - base
        assert advantage == pytest.approx(expected, abs=1e-6)
    if -1 in at and thin:  # the segments' advantages add up to the reward less the value of the prompt
        ends = sorted(place for place in at if place >= 0)
        assert sum(advantages[ends].tolist()) == pytest.approx(reward - at[-1], abs=1e-5)


@given(st.lists(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), max_size=6), min_size=1, max_size=3))
def test_whitening_over_processes_equals_whitening_of_all(processes):
    parts = [torch.tensor([value for value, _ in part], dtype=torch.float64) for part in processes]
    masks = [torch.tensor([chosen for _, chosen in part], dtype=torch.bool) for part in processes]
    total = sum(moments(part, mask) for part, mask in zip(parts, masks))
    chosen = [value for part in processes for value, kept in part if kept]
    for part in parts:
        whitened = whiten(part, total).tolist()
        if len(chosen) < 2:
            assert not any(whitened)
        elif (variance := statistics.variance(chosen)) > 1e-6:
            mean = statistics.fmean(chosen)
            expected = [(value - mean) / (variance + 1e-8) ** 0.5 for value in part.tolist()]
            assert whitened == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segment_boundaries(torch.ones(3), interval=0), "interval: 0 is not a number of tokens"),
        (lambda: segment_advantages(3, [0, 1], [0.5], 1), "values: 1 values for 2 boundaries"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
