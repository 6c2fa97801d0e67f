"""SPAETrainer end to end on the testbed model."""

import math
import re

import pytest
import torch

from step_trl import SPAEConfig
from step_trl.rollout import AnswerProbes
from step_trl.steps import token_bytes


INDUCE = {"answer_prompt": "\n</think>\n\nThe final answer is \\boxed{"}
OPTIONS = INDUCE | {"probe_samples": 2, "max_probe_tokens": 4, "max_completion_length": 160, "learning_rate": 0.0}


@pytest.fixture
def measured(monkeypatch):
    """What was probed: thoughts, and accuracy and confidence at their cuts."""
    calls, original = [], AnswerProbes.run

    def recording(self, thoughts):
        found = original(self, thoughts)
        calls.extend(zip(thoughts, found, strict=True))
        return found

    monkeypatch.setattr(AnswerProbes, "run", recording)
    return calls


def ends_of_steps(pieces, ids):
    """The number of tokens up to each end of a sentence before a blank line, and of the thought."""
    ends, text = [], b""
    for place, token_id in enumerate(ids):
        before, text = text, text + pieces[token_id]
        if b"</think>" in text:
            return ends, place
        if len(re.findall(rb"[.!?]\n\n", text)) > len(re.findall(rb"[.!?]\n\n", before)):
            ends.append(place + 1)
    return ends, len(ids)


def expected_advantages(advantages, measured, thoughts, lengths, options):
    """The advantages `(B, T)` of the batch, computed token by token, before they are standardised."""
    values = [[1.5 * a * c + 0.5 * a - c for a, c in found] for _, found in measured]
    changes = {(row, k): v[k] - v[k - 1] for row, v in enumerate(values) for k in range(1, len(v))}
    low, high = min(changes.values()), max(changes.values())
    raised = {place: math.exp((change - low) / (high - low)) for place, change in changes.items()}
    mean = sum(raised.values()) / len(raised)
    found = torch.zeros(len(lengths), max(lengths), dtype=torch.float64)
    for row, length in enumerate(lengths):
        cuts = measured[row][0].cuts
        for place in range(length):
            step = sum(cut <= place for cut in cuts)
            saturated = sum(value > options["saturation_threshold"] for value in values[row][:step])
            factor = 1 - options["saturation_penalty"] * (1 - math.exp(-saturated))
            in_thought = place < thoughts[row]
            bonus = raised.get((row, step), mean) - mean
            found[row, place] = advantages[row] * (factor if in_thought else 1)
            found[row, place] += options["bonus_weight"] * bonus * in_thought
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"saturation_threshold": 0.9, "saturation_penalty": 0.5, "bonus_weight": 0.5, "max_probes": 3},
        {"saturation_threshold": -0.5, "saturation_penalty": 1.0, "bonus_weight": 0.0},
    ],
    ids=["few", "saturated"],
)
def test_the_loss_sees_steps_credited_by_their_potential(
    build, mixed_problems, credited, measured, tokenizer, options
):
    trainer = build("spae", train_dataset=mixed_problems, **OPTIONS | options)
    batch, inputs, before, after = credited(trainer)
    pieces, mask = token_bytes(tokenizer), inputs["completion_mask"].bool()
    thoughts = []
    for (thought, found), prompt, ids, row in zip(
        measured, batch.prompt_ids, batch.completion_ids, batch.rows, strict=True
    ):
        ends, length = ends_of_steps(pieces, ids)
        thoughts.append(length)
        kept = ends if "max_probes" not in options else [ends[i * len(ends) // 3] for i in range(min(3, len(ends)))]
        assert list(thought.cuts) == sorted(set(kept)) and len(found) == len(thought.cuts)
        assert (list(thought.prompt_ids), thought.completion_ids) == (prompt, ids)
        assert (
            tokenizer.decode(thought.answer_prompt_ids + thought.answer_ids)
            == INDUCE["answer_prompt"] + row["solution"]
        )
    expected = expected_advantages(
        before.tolist(), measured, thoughts, [len(ids) for ids in batch.completion_ids], options
    )
    expected = (expected - expected[mask].mean()) / (expected[mask].var() + 1e-8).sqrt()
    torch.testing.assert_close(after[mask].double(), expected[mask], rtol=1e-4, atol=1e-4)
    assert any(len({*row[own].tolist()}) > 2 for row, own in zip(after, mask))  # of one completion

    logged, pairs = trainer.state.log_history[0], [pair for _, found in measured for pair in found]
    assert logged["spae/steps"] == len(pairs) / 8 > 1
    for name, place in (("accuracy", 0), ("confidence", 1)):
        assert logged[f"spae/{name}"] == pytest.approx(sum(pair[place] for pair in pairs) / len(pairs), abs=1e-5)
    potentials = [1.5 * a * c + 0.5 * a - c for a, c in pairs]
    assert logged["spae/potential"] == pytest.approx(sum(potentials) / len(pairs), abs=1e-5)
    assert 0 < logged["spae/cost"] < 2 * 4 * len(pairs) / mask.sum()
    assert (logged["spae/saturated"] > 0) == (options["bonus_weight"] == 0)


def test_without_steps_it_is_grpo_and_says_so(build, mixed_problems, credited, caplog):
    trainer = build("spae", train_dataset=mixed_problems, step_boundary="@@", pad_to_multiple_of=64, **OPTIONS)
    _, inputs, before, after = credited(trainer)
    mask = inputs["completion_mask"].bool()
    of_tokens = before[:, None].expand_as(mask)[mask]
    expected = (of_tokens - of_tokens.mean()) / (of_tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(after[mask], expected, rtol=1e-4, atol=1e-4)
    assert "No thought had the end of a step, so SPAE trained like GRPO." in caplog.text
    assert trainer.state.log_history[0]["spae/cost"] == 0


def test_places_without_room_for_an_answer_are_not_probed(build, mixed_problems, credited, measured, monkeypatch):
    trainer = build("spae", train_dataset=mixed_problems, **OPTIONS | {"max_completion_length": 100})
    monkeypatch.setattr(type(trainer._policy_engine), "max_length", 100)
    credited(trainer)
    assert any(thought.cuts for thought, _ in measured)
    for thought, _ in measured:
        induced = len(thought.answer_prompt_ids) + max(4, len(thought.answer_ids))
        assert all(len(thought.prompt_ids) + cut + induced <= 100 for cut in thought.cuts)
    assert any(
        len(ids) > max(thought.cuts, default=0) + 30 for thought, _ in measured if (ids := thought.completion_ids)
    )


def test_an_evaluation_has_trl_s_advantages(build, mixed_problems):
    trainer = build(
        "spae",
        trainer_options={"eval_dataset": mixed_problems.select(range(2))},
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        **OPTIONS | {"max_completion_length": 40},
    )
    assert "eval_reward" in trainer.evaluate()


def test_rows_need_a_solution_whatever_the_reward_is(build, mixed_problems):
    rows = mixed_problems.remove_columns("solution")
    with pytest.raises(ValueError, match="solution"):
        build("spae", train_dataset=rows, trainer_options={"reward_funcs": lambda completions, **_: [1.0] * 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_samples": 0}, "probe_samples: 0 is too small"),
        ({"max_probes": 0}, "max_probes: 0 is too small. Set at least 1"),
        ({"probe_temperature": 0.0}, "probe_temperature: 0.0 samples 5 equal answers"),
        ({"answer_prompt": ""}, "answer_prompt: an empty text induces no answer"),
        ({"probe_stop": ""}, "probe_stop: an empty text ends every answer"),
        ({"step_boundary": "["}, r"step_boundary: '\[' is not a regular expression"),
        ({"step_boundary": "x*"}, r"step_boundary: 'x\*' matches an empty text"),
        ({"potential_weights": [1.0]}, r"potential_weights: \[1.0\] are not three"),
        ({"saturation_penalty": 1.5}, "saturation_penalty: 1.5 is not between 0 and 1"),
        ({"bonus_weight": -1.0}, "bonus_weight: -1.0 would reward a loss of potential"),
        ({"loss_type": "vespo"}, "loss_type: 'vespo' needs one advantage per completion"),
        (
            {"rollouts_ahead": 1, "use_vllm": True, "vllm_mode": "server", "weight_sync": "disk"},
            "rollouts_ahead: 1 is not supported by this method",
        ),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1 is not supported"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SPAEConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
