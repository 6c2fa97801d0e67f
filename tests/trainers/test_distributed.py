"""A group that is split over two processes is scored as one."""

import json
import math
from pathlib import Path

import pytest
import torch
from trainers.two_processes import run_two_processes

from step_trl.advantages import (
    answer_clusters,
    credit_steps,
    potential_bonuses,
    ragged_advantages,
    saturation_factors,
    seed_advantages,
    semantic_entropy,
    steps_at_cuts,
)
from step_trl.steps import TriggerSegmenter


pytestmark = pytest.mark.xdist_group("split group")  # which takes long


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records of the two processes, by method."""
    folder = tmp_path_factory.mktemp("split")
    script = Path(__file__).with_name("split_group.py")
    ended = run_two_processes(script, [str(folder / "out")], folder, seconds=600)
    assert [status for status, _ in ended] == [0, 0], ended
    first, second = (json.loads((folder / f"out.{rank}.json").read_text()) for rank in (0, 1))
    return {method: (first[method], second[method]) for method in first}


def test_a_group_split_over_ranks(records, tokenizer):
    first, second = records["step_grpo"]
    assert first["columns"] == second["columns"]
    assert len(first["columns"]) == 8
    correct = [row[0] > 0.5 for row in first["columns"]]
    assert first["correct"] + second["correct"] == correct
    assert any(correct)
    segmenter = TriggerSegmenter(tokenizer)
    steps = [1 + segmenter.count(ids) for ids in first["ids"] + second["ids"]]
    mu = sum(k for k, right in zip(steps, correct) if right) / sum(correct)
    efficiency = [-0.5 * math.tanh((k - mu) / mu) if right else 0.0 for k, right in zip(steps, correct)]
    assert [row[2] for row in first["columns"]] == pytest.approx(efficiency, abs=1e-6)
    lengths = [len(ids) for ids in first["ids"] + second["ids"]]
    lam = [0.5 - (length - min(lengths)) / (max(lengths) - min(lengths)) for length in lengths]
    kimi = [value if right else min(0.0, value) for value, right in zip(lam, correct)]
    assert [row[1] for row in first["columns"]] == pytest.approx(kimi, abs=1e-6)

    rewards = [sum(w * r for w, r in zip(first["weights"], row)) for row in first["columns"]]
    mean = sum(rewards) / 8
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 7)
    advantages = [(reward - mean) / (std + 1e-4) for reward in rewards]
    assert first["advantages"] + second["advantages"] == pytest.approx(advantages, abs=1e-4)


def test_the_answers_of_a_split_group_make_one_entropy(records):
    first, second = records["seed_grpo"]
    clusters = answer_clusters(first["texts"] + second["texts"], 8)
    assert 1 < clusters.max() + 1 <= 8
    correct = torch.tensor(first["correct"] + second["correct"]).float()
    expected = seed_advantages(correct - correct.mean(), semantic_entropy(clusters, 8), 8, alpha=1.0)
    assert first["advantages"] + second["advantages"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert first["logs"]["seed/clusters"] == clusters.max() + 1


def test_the_rate_of_a_split_group_is_that_of_all(records):
    first, second = records["nft"]
    correct = first["correct"] + second["correct"]
    assert 0 < sum(correct) < 8
    assert first["correct_rate"] + second["correct_rate"] == pytest.approx([sum(correct) / 8] * 8)
    assert first["logs"]["nft/kept_groups"] == 1


def test_the_completions_of_a_split_group_share_the_value_of_their_prompt(records):
    first, second = records["spo"]
    (_, shares, means), (_, none, _) = (record["values"][0] for record in (first, second))
    assert shares == [1, 1, 1, 0] and none == [0] * 4
    of_prompt = sum(means[:3]) / 3
    checked = 0
    for record in (first, second):
        places, _, values = record["values"][1]
        for index, row in enumerate(record["rows"]):
            own = {cut: value for (of, cut), value in zip(places, values) if of == index}
            if own:
                assert row[0] == pytest.approx(own[min(own)] - of_prompt, abs=1e-6)
                checked += 1
    assert checked > 2


def test_segments_are_whitened_over_both_ranks(records):
    values = [
        value
        for record in records["spo"]
        for row, mask in zip(record["advantages"], record["in_loss"])
        for value, kept in zip(row, mask)
        if kept
    ]
    assert sum(values) / len(values) == pytest.approx(0, abs=1e-5)
    assert torch.tensor(values).std().item() == pytest.approx(1, abs=1e-3)


def test_bonuses_compare_the_steps_of_both_ranks(records):
    """The changes in potential of all steps have one smallest, one largest, and one mean."""
    both = records["spae"]
    values = [[1.5 * a * c + 0.5 * a - c for a, c in found] for record in both for found in record["measured"]]
    correct = [float(right) for record in both for right in record["correct"]]
    mean, std = sum(correct) / 8, torch.tensor(correct).std().item()
    group = [(right - mean) / (std + 1e-4) for right in correct]
    width = max(map(len, values))
    padded = torch.tensor([row + [math.nan] * (width - len(row)) for row in values])
    factors, bonuses = saturation_factors(padded, -0.5), potential_bonuses(padded)
    cuts = [row for record in both for row in record["cuts"]]
    raw, whitened = [], []
    rows = [row for record in both for row in record["advantages"]]
    for index in range(8):
        last = cuts[index][-1] if cuts[index] else 0  # what follows is not all thought
        steps = steps_at_cuts(cuts[index], last, last)[None]
        own = credit_steps(torch.tensor(group[index : index + 1]), steps, factors[[index]], bonuses[[index]])
        raw += own[0].tolist()
        whitened += rows[index][:last]
    assert min(len(record["cuts"][0]) for record in both) > 1 and len(raw) > 200
    # Standardised: a line through all of them.
    slope = torch.tensor(whitened).std() / torch.tensor(raw).std()
    offset = torch.tensor(whitened).mean() - slope * torch.tensor(raw).mean()
    assert whitened == pytest.approx((slope * torch.tensor(raw) + offset).tolist(), abs=1e-4)
    assert both[0]["logs"]["spae/steps"] == sum(map(len, cuts)) / 8
    tokens = [value for row, mask in zip(rows, both[0]["in_loss"] + both[1]["in_loss"]) for value in row[: sum(mask)]]
    assert sum(tokens) / len(tokens) == pytest.approx(0, abs=1e-4)


def test_a_split_group_has_one_refinement(records):
    first, second = records["critique_grpo"]
    assert first["refined"] == [True, False, False, False] and second["refined"] == [False] * 4
    rewards = [row[0] for row in first["columns"]]
    expected = [reward - sum(rewards) / 8 for reward in rewards]
    assert first["advantages"] + second["advantages"] == pytest.approx(expected, abs=1e-6)
    assert first["logs"]["critique/refined_frac"] == second["logs"]["critique/refined_frac"] == 1


def test_ranks_share_a_budget(records):
    first, second = records["gvm"]
    groups = first["budget"] + second["budget"]
    pairs = set(zip(groups, first["prompts"] + second["prompts"]))
    assert len(pairs) == len(set(groups))
    assert first["columns"] == second["columns"] and len(groups) == 8
    expected = ragged_advantages(
        torch.tensor(first["columns"])[:, 0], torch.tensor(groups), torch.ones(8, dtype=torch.bool)
    )
    assert first["advantages"] + second["advantages"] == pytest.approx(expected.tolist(), abs=1e-5)
    # Each has estimated some of the prompts, and both know all of it.
    assert first["logs"]["budget/accept_rate"] == second["logs"]["budget/accept_rate"]
    assert first["logs"]["budget/mean"] == 8
