"""SPOTrainer end to end on the testbed model: chains and trees."""

import pytest
import torch
from loss_records import full_logps, record_losses

from step_trl import SPOConfig
from step_trl.advantages import segment_advantages, segment_boundaries
from step_trl.report import whole_completions
from step_trl.trainers import spo_chain, spo_tree


CHAIN = {"value_samples": 2, "max_completion_length": 160, "learning_rate": 0.0}
TREE = {
    "structure": "tree",
    "branching": [2, 3],
    "segment_tokens": 80,
    "num_generations": 4,
    "max_completion_length": 200,
}


@pytest.fixture
def continued(monkeypatch):
    """What the chain has sampled for its values: places, numbers of samples, and the mean rewards."""
    calls, original = [], spo_chain.SegmentChain._values

    def recording(self, trainer, batch, places, samples):
        values = original(self, trainer, batch, places, samples)
        calls.append((places, samples, values.tolist()))
        return values

    monkeypatch.setattr(spo_chain.SegmentChain, "_values", recording)
    return calls


def in_loss(losses):
    """Return the number of tokens in the only loss."""
    (inputs,) = [record["inputs"] for record in losses]
    number = (inputs["tool_mask"] * inputs["completion_mask"]).sum()
    assert number == inputs["num_items_in_batch"]
    return number


def whitened(rows, mask):
    raw = torch.zeros(mask.shape, dtype=torch.float64)
    for index, row in enumerate(rows):
        raw[index, : len(row)] = row
    chosen = raw[mask]
    return (raw - chosen.mean()) / (chosen.var() + 1e-8).sqrt()


@pytest.mark.parametrize("prompt_value", ["none", "group_mean", "rollout"])
def test_segments_are_credited_with_the_change_in_value(
    build, mixed_problems, credited, continued, monkeypatch, prompt_value
):
    trainer = build("spo", train_dataset=mixed_problems, prompt_value=prompt_value, cut_interval=3, **CHAIN)
    losses = record_losses(trainer, monkeypatch)
    batch, inputs, _, after = credited(trainer)
    logps, mask = full_logps(trainer, inputs), inputs["completion_mask"].bool()
    correct = [
        float(right and ids[-1] in trainer.eos_token_ids)
        for right, ids in zip(batch.correct.tolist(), batch.completion_ids)
    ]

    values = {}
    for places, samples, means in continued:
        assert all(0 <= mean <= 1 for mean, number in zip(means, samples) if number)
        values |= dict(zip(places, means))
    of_prompts = [None] * 8
    if prompt_value == "group_mean":
        of_prompts = batch.correct.float().view(2, 4).mean(1).repeat_interleave(4).tolist()
    elif prompt_value == "rollout":
        places, samples, means = continued[0]
        assert places == [(index, -1) for index in range(8)] and samples == [1, 1, 0, 0] * 2  # 2 for each group
        of_prompts = [(means[0] + means[1]) / 2] * 4 + [(means[4] + means[5]) / 2] * 4

    rows = []
    for index, ids in enumerate(batch.completion_ids):
        cuts = segment_boundaries(logps[index, : len(ids)].exp(), 0.9, 3)
        base = of_prompts[index]
        of_cuts = [base if cut == -1 and base is not None else values[index, cut] for cut in cuts]
        rows.append(segment_advantages(len(ids), cuts, of_cuts, correct[index], base))
        if base is not None and cuts:  # the segments add up to the change from the prompt to the end
            ends = [*[cut for cut in cuts if cut >= 0], len(ids) - 1]
            assert rows[-1][ends].sum().item() == pytest.approx(correct[index] - base, abs=1e-5)
    uncertain = mask & (logps.exp() < 0.9)
    torch.testing.assert_close(after.double(), whitened(rows, uncertain), rtol=1e-4, atol=1e-4)
    assert any(len({*row.tolist()}) > 2 for row in rows)

    assert in_loss(losses) == uncertain.sum()
    logged = trainer.state.log_history[0]
    assert logged["spo/masked_frac"] == pytest.approx(1 - uncertain.sum().item() / mask.sum().item())
    assert logged["spo/segments"] > 0 and logged["spo/cost"] > 0
    assert logged["rewards/math_accuracy_reward/mean"] == batch.correct.float().mean()


def test_a_value_is_the_mean_reward_of_completions_that_begin_alike(build, mixed_problems, credited, continued):
    seen = []

    def reward(completions, solution, log_metric, log_extra, completion_ids, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        seen.append((texts, completion_ids, solution))
        log_metric("calls", 1.0)
        return [None if text.count("Wait") > 3 else len(text) / 1000 for text in texts]

    trainer = build(
        "spo", train_dataset=mixed_problems, trainer_options={"reward_funcs": reward}, max_segments=2, **CHAIN
    )
    batch, *_ = credited(trainer)
    (places, samples, means) = continued[0]
    texts, all_ids, solutions = seen[1]  # after the batch itself
    assert len(texts) == sum(samples) == 2 * len(places)
    assert max(sum(index == of for of, _ in places) for index in range(8)) == 2  # max_segments
    for number, ((index, cut), mean) in enumerate(zip(places, means)):
        rewards = []
        for place in (2 * number, 2 * number + 1):
            ids = all_ids[place]
            assert ids[: cut + 1] == batch.completion_ids[index][: cut + 1] and len(ids) <= 160
            assert solutions[place] == batch.rows[index]["solution"]
            counts = ids[-1] in trainer.eos_token_ids and texts[place].count("Wait") <= 3
            rewards.append(len(texts[place]) / 1000 if counts else 0.0)
        assert mean == pytest.approx(sum(rewards) / 2, abs=1e-6)
    assert trainer.state.log_history[0]["calls"] == 1.0 and len(seen) == 2  # the second call has left no trace
    assert len(trainer._logs["completion"]) == 8


def test_edges_are_the_samples(build, mixed_problems, credited, monkeypatch):
    trees, original = [], spo_tree.SegmentTree._grow

    def recording(self, trainer, prompts, seeds):
        found = original(self, trainer, prompts, seeds)
        trees.extend(zip([list(prompt) for prompt in prompts], found))
        return found

    monkeypatch.setattr(spo_tree.SegmentTree, "_grow", recording)
    trainer = build("spo", train_dataset=mixed_problems, learning_rate=0.0, **TREE)
    losses = record_losses(trainer, monkeypatch)
    batch, inputs, _, after = credited(trainer)
    assert len(trees) == 2

    edges = {}
    for prompt, tree in trees:
        for node, segment in enumerate(tree):
            path = list(prompt)
            if segment.parent >= 0:
                path += tree[segment.parent].token_ids
            edges[tuple(path), tuple(segment.token_ids)] = prompt, tree, node
    rows, silent = [], []
    for index, ids in enumerate(batch.completion_ids):
        prompt = inputs["prompt_ids"][index][inputs["prompt_mask"][index].bool()].tolist()
        _, tree, node = edges[tuple(prompt), tuple(ids)]
        edge = trainer._segments._edges[index]
        rows.append(torch.full((len(ids),), edge.advantage))
        silent.append(edge.advantage == 0)
        children = 1 if tree[node].is_leaf else 3
        assert edge.rewards[0] * children == pytest.approx(round(edge.rewards[0] * children), abs=1e-6)
        assert 0 <= edge.rewards[0] <= 1
    texts = trainer._tokenizer.batch_decode(batch.prompt_ids)
    assert list(trainer._logs["prompt"]) == texts

    logps = full_logps(trainer, inputs)
    mask = inputs["completion_mask"].bool() & ~torch.tensor(silent)[:, None] & (logps.exp() < 0.9)
    torch.testing.assert_close(after.double(), whitened(rows, mask), rtol=1e-4, atol=1e-4)
    assert in_loss(losses) == mask.sum()
    sampled = torch.nan_to_num(inputs["sampling_per_token_logps"])
    torch.testing.assert_close(sampled, logps * inputs["completion_mask"], rtol=1e-3, atol=1e-3)
    leaves = [segment for _, tree in trees for segment in tree if segment.is_leaf]
    logged = trainer.state.log_history[0]
    lengths = [segment.start + len(segment.token_ids) for segment in leaves]
    assert logged["spo/leaves/length"] == pytest.approx(sum(lengths) / len(lengths))
    assert 0 < logged["spo/leaves/reward"] < 1
    assert whole_completions([logged]) == [
        logged
        | {"completions/mean_length": logged["spo/leaves/length"]}
        | dict.fromkeys(["reward", "rewards/math_accuracy_reward/mean"], logged["spo/leaves/reward"])
    ]


def test_edges_of_earlier_generations_keep_their_log_probabilities(build, mixed_problems, monkeypatch):
    options = TREE | {"num_generations": 8, "edges_per_question": 3, "per_device_train_batch_size": 16}
    trainer = build("spo", train_dataset=mixed_problems, learning_rate=5e-4, max_steps=2, **options)
    losses = record_losses(trainer, monkeypatch)
    trainer.train()
    old = [place for place, edge in enumerate(trainer._segments._edges) if edge.iteration == 1]
    assert old
    inputs = losses[1]["inputs"]
    found = {
        tuple(ids[mask.bool()].tolist()): (logps[mask.bool()], sampled[mask.bool()])
        for ids, mask, logps, sampled in zip(
            inputs["completion_ids"],
            inputs["completion_mask"],
            inputs["old_per_token_logps"],
            inputs["sampling_per_token_logps"],
        )
    }
    for place in old:
        edge = trainer._segments._edges[place]
        logps, sampled = found[tuple(edge.token_ids)]
        torch.testing.assert_close(logps, torch.tensor(edge.logprobs))
        assert sampled.isnan().all()  # not of this policy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_samples": 0}, "value_samples: 0 is too small"),
        ({"max_segments": 0}, "max_segments: 0 allows no segment"),
        ({"prompt_value": "mean"}, "prompt_value: 'mean' is not known"),
        ({"structure": "forest"}, "structure: 'forest' is not known"),
        ({"branching": [1, 1]}, r"branching: \[1, 1\] is not a tree"),
        ({"max_mean_ratio": 1.0}, "max_mean_ratio: 1.0 is not above 1"),
        ({"cut_threshold": 0.0}, "cut_threshold: 0.0 is not a probability"),
        ({"length_reward": "kimi"}, "length_reward: 'kimi' compares a completion with its group"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1 is not supported by rollouts that are not TRL's"),
        ({"loss_type": "vespo"}, "loss_type: 'vespo' needs one advantage per completion"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_an_evaluation_has_advantages_of_completions(build, mixed_problems):
    """With several updates per rollout, TRL computes old log-probabilities in an evaluation, too."""
    trainer = build(
        "spo", num_iterations=2, num_generations_eval=1, per_device_eval_batch_size=2, max_completion_length=40,
        trainer_options={"eval_dataset": mixed_problems.select(range(2))},
    )  # fmt: skip
    assert "eval_reward" in trainer.evaluate()


def test_a_tree_needs_whole_groups(tmp_path):
    config = SPOConfig(str(tmp_path), bf16=False, use_cpu=True, structure="tree", num_generations=8)
    config.per_device_train_batch_size = 4  # as with two processes of half a group each
    with pytest.raises(ValueError, match="num_generations: 4 completions per process"):
        config._check_whole_groups()


def test_another_sampler_is_refused(build):
    with pytest.raises(ValueError, match="rollout_func: SPO samples completions itself"):
        build("spo", trainer_options={"rollout_func": lambda prompts, trainer: {}})
