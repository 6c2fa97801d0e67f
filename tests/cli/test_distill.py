"""DEER+SFT on the testbed."""

import json

import pandas as pd
import pytest
from safetensors.torch import load_file
from small_runs import SMALL_RUN
from trl import ModelConfig

from step_trl import testbed
from step_trl.cli.arguments import DistillArguments, FineTuningConfig
from step_trl.cli.distill import distill, keep, keep_short, statistics
from step_trl.cli.fine_tuning import examples_of, training_rows
from step_trl.rollout.engines import vllm_process
from step_trl.testbed import vision


SAMPLES = pd.DataFrame(
    {
        "benchmark": "train",
        "problem": ["0", "0", "0", "0", "1", "1", "2"],
        "sample": [0, 1, 2, 3, 0, 1, 0],
        "completion": ["long", "short", "short", "open", "wrong", "fine", "wrong"],
        "correct": [True, True, True, True, False, True, False],
        "tokens": [30, 10, 10, 5, 3, 40, 9],
        "steps": 1,
        "exit": [False, True, True, False, True, False, True],
        "finish_reason": ["eos", "eos", "eos", "length", "eos", "eos", "eos"],
    }
)


def test_the_shortest_right_ones_are_kept():
    assert keep_short(SAMPLES)["completion"].tolist() == ["short", "fine"]
    kept = keep_short(SAMPLES, per_problem=3)
    assert kept["completion"].tolist() == ["short", "long", "fine"]
    assert statistics(SAMPLES, kept) == pytest.approx(
        {
            "problems": 3,
            "samples": 7,
            "accuracy": 5 / 7,
            "exit rate": 4 / 7,
            "tokens": 107 / 7,
            "kept": 3,
            "problems kept": 2,
            "tokens kept": 80 / 3,
            "exit rate kept": 1 / 3,
        }
    )
    assert keep_short(SAMPLES[SAMPLES["problem"] == "2"]).empty


def test_some_lose_their_thoughts(tmp_path):
    samples = pd.concat([SAMPLES[SAMPLES["problem"] == "1"]] * 40, ignore_index=True)
    samples["problem"] = [str(place // 2) for place in range(80)]
    samples["completion"] = "2 + 2.</think>4"
    keep(samples, 1, tmp_path, thought_dropout=0.5, seed=0)
    kept = pd.read_parquet(tmp_path / "kept.parquet")["completion"].tolist()
    assert [place for place, text in enumerate(kept) if text == "\n\n</think>4"][:8] == [0, 1, 3, 4, 5, 11, 16, 17]
    assert set(kept) == {"2 + 2.</think>4", "\n\n</think>4"}
    with pytest.raises(ValueError, match=r"thought_dropout: 2\.0 is not a probability"):
        DistillArguments("distill", "testbed", thought_dropout=2.0)


def test_rows_end_in_eos_and_mask_their_prompt():
    tokenizer, problems = testbed.load_tokenizer(), testbed.load_dataset("easy")
    kept = pd.DataFrame({"problem": ["3"], "completion": ["1 + 1 = 2.\n</think>\n\nThe final answer is \\boxed{2}."]})
    (row,) = training_rows(examples_of(kept, problems), tokenizer)
    start = row["completion_mask"].index(1)
    prompt = tokenizer.apply_chat_template(problems[3]["prompt"], add_generation_prompt=True, return_dict=False)
    assert row["input_ids"][:start] == prompt and row["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["input_ids"][start:-1]) == kept["completion"][0]
    assert set(row["completion_mask"][start:]) == {1}


@pytest.mark.timeout(600)
def test_a_model_learns_from_its_short_completions(tmp_path, capsys):
    options = SMALL_RUN | {"max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    arguments = DistillArguments("distill", "testbed", dataset_split="easy", limit=24, n=2, max_tokens=300)

    def run():
        return distill(arguments, ModelConfig("testbed"), FineTuningConfig(str(tmp_path / "run"), **options))

    figures = run()
    assert 0 < figures["kept"] <= 24 and figures["tokens kept"] < figures["tokens"] and figures["exit rate"] > 0
    assert "tokens kept" in capsys.readouterr().out
    kept = pd.read_parquet(tmp_path / "run" / "kept.parquet")
    assert len(kept) == figures["kept"] and kept["correct"].all()
    trained, vanilla = load_file(tmp_path / "run" / "model.safetensors"), testbed.load_model().state_dict()
    assert any((trained[name] != vanilla[name]).any() for name in trained)

    with pytest.raises(ValueError, match=r"output_dir: .*run holds a model"):
        run()
    # Samples that are there are not made again.
    (tmp_path / "run" / "model.safetensors").unlink()
    files = sorted((tmp_path / "run" / "samples").glob("*.parquet"))
    assert run() == figures
    assert sorted((tmp_path / "run" / "samples").glob("*.parquet")) == files


def test_answers_in_blocks_are_graded_as_such(tmp_path):
    """Math accuracy would find none. With confidence 1.0, there are no probes."""
    recipe = {"limit": 8, "n": 1, "max_tokens": 200, "grader": "block", "confidence": 1.0}
    arguments = DistillArguments("distill", "vision-testbed", dataset_split="easy", **recipe)
    model = ModelConfig(str(vision.MODEL_DIR), dtype="float32")
    figures = distill(arguments, model, FineTuningConfig(str(tmp_path / "run"), **SMALL_RUN))
    assert figures["accuracy"] > 0.2 and figures["exit rate kept"] == 0
    settings = json.loads((tmp_path / "run" / "samples" / "settings.json").read_text())
    assert settings["callbacks"] == []
    with pytest.raises(ValueError, match=r"grader: 'colour' is not known. Set one of 'math', 'choice'"):
        DistillArguments("distill", "testbed", grader="colour")


def test_nothing_to_learn_from(tmp_path):
    arguments = DistillArguments("distill", "testbed", limit=2, n=1, max_tokens=10)
    with pytest.raises(ValueError, match="n: none of the 2 samples is both correct and complete"):
        distill(arguments, ModelConfig("testbed"), FineTuningConfig(str(tmp_path / "run"), **SMALL_RUN))


def test_a_server_for_the_sampling_is_none_of_the_launcher_s_processes(monkeypatch):
    """Otherwise, it would be a client of their store, and wait for the first process, which is itself."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    started = []

    def start(command, environment, log):
        started.append(environment)
        raise FileNotFoundError

    monkeypatch.setattr(vllm_process, "start_supervised", start)
    with pytest.raises(FileNotFoundError):
        vllm_process.VLLMServer("m").start()
    assert "PATH" in started[0] and not [
        name for name in started[0] if name.startswith(vllm_process.LAUNCHER_VARIABLES)
    ]
