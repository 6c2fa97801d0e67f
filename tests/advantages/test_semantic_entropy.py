"""SEED-GRPO's entropies and factors against the numbers of the formulas and against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl.advantages import answer_clusters, cluster_answers, seed_advantages, seed_scale, semantic_entropy


LIKELIHOOD = {"estimator": "likelihood"}


def ids(*clusters):
    return torch.tensor(clusters)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def entropies(clusters, **options):
    """Return the entropies of one group, in float64."""
    equal = torch.zeros(len(clusters), dtype=torch.float64)  # equal likelihoods are counts
    found = semantic_entropy(clusters, len(clusters), **{"logps": equal} | LIKELIHOOD | options)
    assert (found == found[0]).all()
    return found[0].item()


def close(value, expected):
    return value == pytest.approx(expected, abs=1e-10)


def test_three_of_four_agree():
    clusters, advantages = ids(0, 0, 0, 1), double(0.25, 0.25, 0.25, -0.75)
    found = semantic_entropy(clusters, 4)
    torch.testing.assert_close(found, torch.full((4,), 0.8369882168))
    assert close(entropies(clusters), 0.8369882168)
    entropy = double(*[entropies(clusters)] * 4)
    assert close((entropy / math.log(4))[0].item(), 0.6037593748)
    for form, factor in {
        "linear": 0.9879248125,
        "exponential": 0.9879974250,
        "focal": 0.9759954352,
        "inverse": 0.9880688830,
    }.items():
        assert close(seed_scale(entropy, 4, f=form).tolist(), [factor] * 4), form
        assert close(seed_advantages(advantages, entropy, 4, f=form).tolist(), (advantages * factor).tolist()), form
    scaled = seed_advantages(advantages, entropy, 4)
    assert close(scaled.tolist(), [0.2469812031] * 3 + [-0.7409436094])
    assert close(seed_scale(entropy, 4, alpha=1.0)[0].item(), 0.3962406252)
    scaled = seed_advantages(advantages, entropy, 4, alpha=1.0)
    assert close(scaled.tolist(), [0.0990601563] * 3 + [-0.2971804689])


def test_three_of_four_agree_by_shannon():
    clusters = ids(7, 7, 7, 5)
    torch.testing.assert_close(semantic_entropy(clusters, 4, entropy="shannon"), torch.full((4,), 0.5623351446))
    entropy = entropies(clusters, entropy="shannon")
    assert close(entropy, 0.5623351446)
    assert close(entropy / math.log(4), 0.4056390622)
    assert close(seed_scale(double(entropy), 4)[0].item(), 0.9918872188)
    assert close(seed_scale(double(entropy), 4, alpha=1.0)[0].item(), 0.5943609378)


@pytest.mark.parametrize("form", ["linear", "exponential", "focal", "inverse"])
@pytest.mark.parametrize("entropy", ["eq5", "shannon"])
def test_groups_that_agree_keep_their_advantages(form, entropy):
    for options in ({}, LIKELIHOOD | {"logps": torch.tensor([-0.1, -30.0, -2.0, -0.7])}):
        found = semantic_entropy(ids(3, 3, 3, 3), 4, entropy=entropy, **options)
        assert found.tolist() == [0.0] * 4
        advantages = torch.tensor([0.25, 0.25, 0.25, -0.75])
        assert torch.equal(seed_advantages(advantages, found, 4, alpha=1.0, f=form), advantages)


def test_four_different_answers():
    clusters, advantages = ids(0, 1, 2, 3), double(0.75, -0.25, -0.25, -0.25)
    for entropy in ("eq5", "shannon"):
        found = entropies(clusters, entropy=entropy)
        assert close(found, math.log(4))
        scaled = seed_advantages(advantages, double(*[found] * 4), 4)
        assert close(scaled.tolist(), [0.735, -0.245, -0.245, -0.245])
        assert close(seed_advantages(advantages, double(*[found] * 4), 4, alpha=1.0).tolist(), [0.0] * 4)


def test_likelihoods():
    clusters, logps = ids(0, 0, 1, 2), double(-0.2, -0.4, -0.3, -1.0)
    assert close(entropies(clusters, logps=logps), 1.2552654702)
    assert close(entropies(clusters, logps=logps, entropy="shannon"), 0.9535964567)
    # the mass of each cluster, by the entropy of that cluster and the rest
    for members, mass in (([0, 1], 0.5732082307), ([2], 0.2851770415), ([3], 0.1416147278)):
        against_the_rest = ids(*[int(row in members) for row in range(4)])
        expected = -(math.log(mass) + math.log1p(-mass)) / 2
        assert entropies(against_the_rest, logps=logps) == pytest.approx(expected, abs=1e-9)


def test_five_of_eight_agree():
    clusters = ids(0, 0, 0, 0, 0, 1, 2, 3)
    assert close(entropies(clusters), 1.6770820636)
    assert close(entropies(clusters, entropy="shannon"), 1.0735428465)
    assert close(math.log(8), 2.0794415417)


def test_missing_answers_are_clusters_of_their_own():
    assert cluster_answers(["a", None, None, "a"], 4).tolist() == [0, 1, 2, 0]
    assert cluster_answers([None, "a", "a", None, None, None], 3).tolist() == [0, 1, 1, 0, 1, 2]
    # counts (2, 1, 1)
    expected = -(math.log(0.5) + 2 * math.log(0.25)) / 3
    assert close(entropies(cluster_answers(["a", "a", None, None], 4)), expected)


def test_clusters_are_those_of_a_group():
    assert cluster_answers(["4", "5", "5", "4"], 2).tolist() == [0, 1, 0, 1]
    assert cluster_answers([], 4).tolist() == []
    alone = semantic_entropy(ids(0, 1, 1, 0, 2, 2), 2)
    torch.testing.assert_close(alone, torch.tensor([math.log(2)] * 4 + [0.0] * 2))


def test_answers_of_completions():
    texts = [
        r"<think>\boxed{4}</think>So \boxed{\frac12}.",
        r"\boxed{0.5}",
        r"Answer: 1/2",
        r"<think>\boxed{4}</think>I do not know.",
        r"\boxed{2\sqrt{3}}",
        r"\boxed{\sqrt{12}}",
        "none",
        r"\boxed{2\sqrt3}",
    ]
    assert answer_clusters(texts, 4).tolist() == [0, 0, 0, 1, 0, 1, 2, 0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert answer_clusters(messages, 8).tolist() == [0, 0, 0, 1, 2, 3, 4, 2]
    assert answer_clusters([r"\boxed{4}", r"</think>\boxed{4}"], 2, require_end_of_thinking=True).tolist() == [0, 1]
    assert answer_clusters([r"\boxed{4}", r"</think>\boxed{4}"], 2).tolist() == [0, 0]


def test_entropies_of_likelihoods_may_exceed_the_logarithm_and_the_factor_stops_there():
    # masses .98, .01, .01
    entropy = entropies(ids(0, 1, 2), logps=double(math.log(0.98), math.log(0.01), math.log(0.01)))
    assert entropy == pytest.approx(3.077, abs=5e-4)
    assert entropy > math.log(8)
    assert seed_scale(double(entropy), 8, alpha=1.0).tolist() == [0.0]
    assert close(seed_scale(double(entropy), 8).tolist(), [0.98])
    assert seed_scale(double(math.inf), 8, f="inverse").tolist() == pytest.approx([1 / 1.02])


@pytest.mark.parametrize("form", ["linear", "focal", "exponential", "inverse"])
def test_no_strength_turns_advantages_around(form):
    entropy = torch.linspace(0, math.log(4), 20)
    factors = seed_scale(entropy, 4, alpha=3.0, f=form)
    assert (factors >= 0).all() and factors[0] == 1 and (factors.diff() <= 0).all()
    assert (factors[-1] == 0) == (form in ("linear", "focal"))


def test_gamma_is_the_exponent_of_the_focal_form():
    entropy = double(math.log(4) / 2)
    assert close(seed_scale(entropy, 4, alpha=1.0, f="focal").item(), 0.25)
    assert close(seed_scale(entropy, 4, alpha=1.0, f="focal", gamma=3.0).item(), 0.125)
    assert close(seed_scale(entropy, 4, alpha=1.0, gamma=3.0).item(), 0.5)


def test_types_and_sizes():
    assert semantic_entropy(ids(0, 1), 2).dtype == torch.float32
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert semantic_entropy(ids(0, 1), 2, half, "likelihood").dtype == torch.float32
    assert seed_advantages(half, torch.ones(2), 2).dtype == torch.bfloat16
    assert semantic_entropy(torch.zeros(0, dtype=torch.long), 4).shape == (0,)
    logps = torch.zeros(2, requires_grad=True)
    assert not semantic_entropy(ids(0, 1), 2, logps, "likelihood").requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: semantic_entropy(ids(0, 1), 2, estimator="nli"), "estimator: 'nli'.*'count', 'likelihood'"),
        (lambda: semantic_entropy(ids(0, 1), 2, entropy="eq4"), "entropy: 'eq4'.*'eq5', 'shannon'"),
        (
            lambda: semantic_entropy(ids(0, 1), 2, estimator="likelihood"),
            "logps: estimator='likelihood' needs them.*estimator='count'",
        ),
        (lambda: semantic_entropy(ids(0, 1, 1), 2), "clusters: 3 completions.*num_generations=2"),
        (lambda: cluster_answers(["a"] * 3, 2), "answers: 3 completions.*num_generations=2"),
        (lambda: seed_scale(double(0.0), 1), "num_generations: 1 .*Set at least 2"),
        (lambda: seed_scale(double(0.0), 4, f="cubic"), "f: 'cubic'.*'linear'"),
        (lambda: seed_scale(double(0.0), 4, alpha=-0.1), "alpha: -0.1 "),
        (lambda: seed_advantages(double(1.0), double(0.0), 1), "num_generations: 1 "),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def reference(clusters, logps, num_generations, entropy):
    """Compute the reference values with dictionaries and `math`."""
    result = []
    for start in range(0, len(clusters), num_generations):
        masses = {}
        for row in range(start, start + num_generations):
            masses[clusters[row]] = masses.get(clusters[row], 0) + math.exp(logps[row])
        total = sum(masses.values())
        shares = [mass / total for mass in masses.values()]
        if entropy == "eq5":
            value = -sum(map(math.log, shares)) / len(shares)
        else:
            value = -sum(share * math.log(share) for share in shares)
        result += [value] * num_generations
    return result


@settings(max_examples=300)
@given(
    st.data(),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from(["count", "likelihood"]),
    st.sampled_from(["eq5", "shannon"]),
)
def test_entropies_equal_the_reference(data, num_generations, groups, estimator, entropy):
    size = num_generations * groups
    clusters = data.draw(st.lists(st.integers(-2, 5), min_size=size, max_size=size))
    logps = data.draw(st.lists(st.floats(-8, 0), min_size=size, max_size=size))
    found = semantic_entropy(torch.tensor(clusters), num_generations, double(*logps), estimator, entropy)
    expected = reference(clusters, [0.0] * size if estimator == "count" else logps, num_generations, entropy)
    assert found.tolist() == pytest.approx(expected, abs=1e-9 if estimator == "likelihood" else 1e-6)


@settings(max_examples=200)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=4, max_size=4), max_size=3))
def test_clusters_equal_the_reference(groups):
    clusters = cluster_answers([answer for group in groups for answer in group], 4).view(-1, 4).tolist()
    for answers, numbers in zip(groups, clusters, strict=True):
        for i in range(4):
            for j in range(4):
                together = i == j or (answers[i] == answers[j] and answers[i] is not None)
                assert (numbers[i] == numbers[j]) == together
        assert sorted(set(numbers)) == list(range(len(set(numbers))))
