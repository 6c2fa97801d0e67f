"""A trainer's log, read back from its folder and from the files of the real W&B client."""

import json
import os
import time
from pathlib import Path

import pytest
import wandb
from small_runs import SMALL_RUN

from step_trl import SASConfig, SASTrainer, testbed
from step_trl.report import read_history, whole_completions


HISTORY = [{"step": step, "entropy": step / 10} for step in range(1, 12)]


def test_the_folder_of_a_trainer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: .* contains no trainer_state\.json"):
        read_history(tmp_path)
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY[:step]}))
    assert read_history(tmp_path) == HISTORY[:10]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    assert whole_completions(read_history(str(tmp_path))) == HISTORY


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_run_of_wandb(offline, tmp_path):
    options = SMALL_RUN | {"max_steps": 3, "report_to": "wandb", "eval_strategy": "steps", "eval_steps": 2}
    args = SASConfig(
        str(tmp_path / "run"),
        **options,
        max_completion_length=32,
        num_generations=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
    )
    trainer = SASTrainer(
        testbed.load_model(),
        args=args,
        train_dataset=testbed.load_dataset("train").select(range(16)),
        eval_dataset=testbed.load_dataset("easy").select(range(2)),
        processing_class=testbed.load_tokenizer(),
    )
    trainer.train()
    folder = Path(wandb.run.dir).parent
    wandb.finish()
    *logged, totals = trainer.state.log_history
    assert "train_runtime" in totals and any("eval_loss" in entry for entry in logged)
    assert _written(folder, len(logged)) == [pytest.approx(_numbers(entry), nan_ok=True) for entry in logged]


def _written(folder, entries):
    """W&B's service may write the end of a run's file shortly after `finish`."""
    for _ in range(200):
        history = read_history(folder)
        if len(history) >= entries:
            break
        time.sleep(0.1)
    return history


def _numbers(entry):
    return {key: value for key, value in entry.items() if isinstance(value, int | float)}


def test_a_run_that_is_under_way_and_longer_than_a_block(offline, tmp_path):
    """A record may span several blocks of the file, and the last one may be incomplete."""
    run = wandb.init(project="test")
    for step in range(1, 40):
        run.log({"train/global_step": step, "train/entropy": step / 10, "train/text": "x" * 5000 * (step % 20)})
    folder = Path(run.dir).parent
    run.finish()
    history = _written(folder, 39)
    assert history == [{"step": step, "entropy": step / 10} for step in range(1, 40)]
    (path,) = folder.glob("run-*.wandb")
    whole = path.read_bytes()
    assert len(whole) > 10 * 32768
    for length in (len(whole) // 2, 40000, 5, 0):
        os.truncate(path, length)
        part = read_history(folder)
        assert part == history[: len(part)]
    assert part == []


def test_a_run_on_the_server(monkeypatch):
    class Run:
        def scan_history(self):
            return iter([{"train/global_step": 3, "train/entropy": 0.5, "eval/loss": 2.0, "_step": 1, "a": "b"}])

    paths = []
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"run": lambda _, path: paths.append(path) or Run()})())
    assert read_history("wandb:us/project/run") == [{"step": 3, "entropy": 0.5, "eval_loss": 2.0}]
    assert paths == ["us/project/run"]
