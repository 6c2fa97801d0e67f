"""NFT's loss and its gradient against the numbers of the formulas, and against GRPO's advantages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from step_trl.losses import nft_loss, nft_statistics


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def one_token(ratio, correct, rate, **options):
    """Loss and gradient of one token."""
    logps = double([math.log(ratio) - 1.0]).requires_grad_()
    loss = nft_loss(logps, double([-1.0]), torch.tensor([correct]), double(rate), **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return loss.item(), gradient.item()


def gradient_of(logps, *arguments, **options):
    logps = logps.detach().clone().requires_grad_()
    return torch.autograd.grad(nft_loss(logps, *arguments, **options).sum(), logps)[0]


# r, R, then (value, gradient): correct and failed with omega 1, correct and failed with omega 0, failed with omega 2
TABLE = [
    (0.25, 1.0, (0, -0.75), (0, 0.25), (0, -1), (0, 0.3333333333), (0, 0.5773502692)),
    (0.25, 1.2, (-0.1367411676, -0.75), (0, 0.3), (-0.1823215568, -1), (0, 0.4), (0, 0.692820323)),
    (
        *(0.25, 0.8),
        *((0.1673576635, -0.75), (-0.0484038909, 0.1875), (0.2231435513, -1)),
        *((-0.0645385211, 0.25), (-0.1117839977, 0.4330127019)),
    ),
    (0.75, 1.2, (-0.0455803892, -0.25), (0, 0.9), (-0.1823215568, -1), (0, 3.6), (0, 2.0784609691)),
    (
        *(0.75, 0.8),
        *((0.0557858878, -0.25), (-0.1175009073, 0.375), (0.2231435513, -1)),
        *((-0.4700036292, 1.5), (-0.2713567219, 0.8660254038)),
    ),
    (0.5, 2.0, (-0.3465735903, -0.5), (0, 1.0), (-0.6931471806, -1), (0, 2.0), (0, 2.0)),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"r={row[0]} R={row[1]}")
def test_losses_and_gradients_of_a_token(row):
    rate, ratio, *expected = row
    found = [
        one_token(ratio, correct, rate, omega=omega)
        for correct, omega in ((True, 1), (False, 1), (True, 0), (False, 0), (False, 2))
    ]
    for pair, numbers in zip(found, expected, strict=True):
        assert pair == pytest.approx(numbers, abs=1e-10)


def test_a_lower_clamp():
    assert one_token(1.2, False, 0.5, clamp_negative=0.5) == pytest.approx((0.1115717757, 0.75), abs=1e-10)
    assert one_token(1.8, False, 0.5, clamp_negative=0.5) == pytest.approx((0.3465735903, 1.8), abs=1e-10)


def test_rates_near_the_ends_are_limited():
    for correct in (True, False):
        for omega in (0, 1, 2):
            for rate, used in ((1 / 64, 0.02), (63 / 64, 0.98)):
                assert one_token(0.8, correct, rate, omega=omega) == one_token(0.8, correct, used, omega=omega)
    assert one_token(0.8, True, 0.02) == pytest.approx((-0.98 * math.log(0.8), -0.98))
    assert one_token(0.8, True, 0.03) == pytest.approx((-0.97 * math.log(0.8), -0.97))


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("omega", [0, 1, 2])
def test_groups_without_a_difference_have_no_loss(rate, omega):
    for correct in (True, False):
        assert one_token(0.7, correct, rate, omega=omega) == (0, 0)


def test_a_group_of_four():
    correct = torch.tensor([True, False, False, False])
    old = torch.full((4, 1), -0.7, dtype=torch.float64)
    gradient = gradient_of(old, old, correct, torch.full((4,), 0.25))
    torch.testing.assert_close(gradient[:, 0], double(-0.75, 0.25, 0.25, 0.25))  # minus Dr.GRPO's advantages


@settings(max_examples=100)
@given(st.lists(st.booleans(), min_size=2, max_size=40), st.integers(1, 3))
def test_gradients_of_the_first_update_are_grpo_s(correct, length):
    assume(any(correct) and not all(correct))
    rewards = double(*map(float, correct))
    rates = rewards.mean().expand(len(correct))
    assume(0.02 <= rates[0] <= 0.98)
    old = torch.linspace(-3, -0.1, len(correct) * length, dtype=torch.float64).view(-1, length)
    advantages = rewards - rewards.mean()
    for omega, scaled in ((1, advantages), (2, advantages / rewards.std(correction=0))):
        gradient = gradient_of(old, old, torch.tensor(correct), rates, omega=omega)
        torch.testing.assert_close(gradient, -scaled[:, None].expand_as(old), rtol=0, atol=1e-12)


def closed_form(ratio, correct, rate, eps, negative_weight, omega):
    rate = min(max(rate, 0.02), 0.98)
    weight = (1, 1 - rate, math.sqrt((1 - rate) / rate))[omega]
    if correct:
        return -weight * math.log(ratio), -weight
    proxy = (1 - rate * ratio) / (1 - rate)
    value = -weight * negative_weight * math.log(max(proxy, eps))
    return value, weight * negative_weight * rate / (1 - rate) * ratio / max(proxy, eps)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.floats(0.05, 20), st.booleans(), st.floats(0.001, 0.999)),
        min_size=1,
        max_size=5,
    ),
    st.floats(0.1, 1.5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0, 1, 2]),
)
def test_autograd_equals_the_closed_form(rows, eps, negative_weight, omega):
    ratios, correct, rates = map(list, zip(*rows, strict=True))
    old = torch.full((len(rows), 1), -0.3, dtype=torch.float64)
    logps = (double(*ratios).log()[:, None] + old).requires_grad_()
    loss = nft_loss(logps, old, torch.tensor(correct), double(*rates), eps, negative_weight, omega)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    for index, row in enumerate(rows):
        found = loss[index].item(), gradient[index].item()
        assert found == pytest.approx(closed_form(*row, eps, negative_weight, omega), rel=1e-6, abs=1e-9)


def test_log_ratios_are_capped():
    capped = -0.5 * 10, 0.0
    assert one_token(math.exp(10.5), True, 0.5) == pytest.approx(capped)
    assert one_token(math.exp(9.5), True, 0.5) == pytest.approx((-0.5 * 9.5, -0.5))
    assert one_token(math.exp(50), False, 0.5)[1] == 0
    assert one_token(math.exp(9.5), False, 0.5)[1] == pytest.approx(0.5 * math.exp(9.5))


def test_without_a_weight_of_failures_only_correct_completions_are_trained_on():
    assert one_token(0.8, False, 0.25, negative_weight=0.0) == (0, 0)
    assert one_token(0.8, True, 0.25, negative_weight=0.0) == one_token(0.8, True, 0.25)
    half = one_token(0.8, False, 0.25, negative_weight=0.5)
    assert half == pytest.approx([value / 2 for value in one_token(0.8, False, 0.25)])


RAGGED = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])


def test_masked_tokens_have_no_loss():
    logps = double([-0.5, -0.6, math.nan], [-0.5, -0.6, -0.7], [math.nan, math.inf, -1.0])
    old = double([-0.7, -0.5, -0.5], [-0.4, -0.5, -0.6], [-1.0, -1.0, -1.0])
    arguments = (old, torch.tensor([True, False, False]), torch.full((3,), 0.5))
    for level in (False, True):
        # also where the clamped proxy has a loss of its own
        options = {"clamp_negative": 1.5, "sequence_level": level}
        loss = nft_loss(logps, *arguments, mask=RAGGED, **options)
        gradient = gradient_of(logps, *arguments, mask=RAGGED, **options)
        assert ((loss != 0) == RAGGED.bool()).all() and ((gradient != 0) == RAGGED.bool()).all()
        alone = nft_loss(logps[1:2], old[1:2], torch.tensor([False]), torch.tensor([0.5]), **options)
        torch.testing.assert_close(loss[1:2], alone)


def test_ratio_of_completions():
    ratios = double([1.1, 0.9, 7.0], [1.2, 1.1, 0.5])
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    arguments = (old, torch.tensor([True, False]), torch.full((2,), 0.5))
    options = {"mask": RAGGED[:2], "sequence_level": True}
    loss = nft_loss(ratios.log() + old, *arguments, **options)
    gradient = gradient_of(ratios.log() + old, *arguments, **options)
    for row, (product, correct) in enumerate(((1.1 * 0.9, True), (1.2 * 1.1 * 0.5, False))):
        value, slope = one_token(product, correct, 0.5)
        count = int(RAGGED[row].sum())
        assert loss[row].tolist() == pytest.approx([value / count] * count + [0] * (3 - count))
        assert gradient[row].tolist() == pytest.approx([slope] * count + [0] * (3 - count))


def test_rewards_and_half_precision_are_taken():
    logps = torch.tensor([[-0.5], [-0.5]], dtype=torch.bfloat16)
    old = torch.tensor([[-0.25], [-0.25]], dtype=torch.bfloat16)
    loss = nft_loss(logps, old, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    assert loss.dtype == torch.float32
    expected = [one_token(math.exp(-0.25), correct, 0.5)[0] for correct in (True, False)]
    assert loss[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


def means(*arguments, **options):
    return {
        name: value[where].mean().item() if where.any() else None
        for name, (value, where) in nft_statistics(*arguments, **options).items()
    }


def test_statistics():
    ratios = double([0.8, 1.2, 5.0], [1.1, 2.0, 0.9], [9.0, 9.0, 9.0], [0.1, 0.1, 0.1])
    old = torch.full((4, 3), -3.0, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    # one failed completion in a mixed group and one in another, a correct one, and a group of failures
    arguments = (ratios.log() + old, old, torch.tensor([False, False, True, False]), double(0.5, 0.5, 0.5, 0.0))
    found = means(*arguments, mask=mask)
    # proxies 1.2, 0.8 and 0.9, 0, 1.1
    assert found == pytest.approx({"kept_groups": 0.75, "neg_clamped_frac": 0.6, "ratio_neg_mean": 6.0 / 5})
    assert means(*arguments, 0.5, mask=mask)["neg_clamped_frac"] == pytest.approx(0.2)
    sequences = means(*arguments, mask=mask, sequence_level=True)
    assert sequences == pytest.approx(
        {"kept_groups": 0.75, "neg_clamped_frac": 0.5, "ratio_neg_mean": (0.8 * 1.2 + 1.1 * 2.0 * 0.9) / 2}
    )
    none = means(old, old, torch.ones(4), torch.ones(4))
    assert none == {"kept_groups": 0, "neg_clamped_frac": None, "ratio_neg_mean": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clamp_negative": 0.0}, r"clamp_negative: 0\.0 .*1\.0"),
        ({"negative_weight": -1.0}, r"negative_weight: -1\.0 .*Set 0"),
        ({"omega": 3}, "omega: 3 .*0, 1, 2"),
        ({"old_logps": torch.zeros(2, 2)}, r"old_logps: the shape \(2, 2\).*\(2, 3\)"),
        ({"correct": torch.ones(3)}, r"correct: the shape \(3,\).*Give \(2,\)"),
        ({"correct_rate": torch.ones(2, 1)}, r"correct_rate: the shape \(2, 1\).*Give \(2,\)"),
        ({"mask": torch.ones(2)}, r"mask: the shape \(2,\).*Give \(2, 3\)"),
        ({"correct_rate": torch.tensor([0.5, 3.0])}, r"correct_rate: \[0\.5, 3\.0\].*the share"),
        ({"correct_rate": torch.tensor([0.5, -0.5])}, "correct_rate: .*outside 0 to 1"),
        ({"correct_rate": torch.tensor([0.5, math.nan])}, "correct_rate: .*outside 0 to 1"),
    ],
)
def test_arguments_are_checked(changes, message):
    arguments = {
        "logps": torch.zeros(2, 3),
        "old_logps": torch.zeros(2, 3),
        "correct": torch.ones(2),
        "correct_rate": torch.full((2,), 0.5),
    }
    assert nft_loss(**arguments).shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        nft_loss(**arguments | changes)
