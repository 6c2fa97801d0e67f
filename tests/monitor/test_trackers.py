"""What the real clients of the trackers write: Weights & Biases offline, TensorBoard, Trackio on this machine."""

import json
import re
import time
from html import escape
from pathlib import Path

import pytest
import wandb
from preloaded import run_preloaded
from small_runs import SMALL_RUN

from step_trl import SASConfig, SASTrainer, StepGRPOConfig, StepGRPOTrainer, testbed
from step_trl.monitor import TrackerCallback
from step_trl.monitor.samples import as_text
from step_trl.monitor.workspace import merged_charts, wandb_workspace
from step_trl.report.history import _records


KEPT = 3  # completions per logging step
METHODS = {"step_grpo": (StepGRPOConfig, StepGRPOTrainer), "sas": (SASConfig, SASTrainer)}


def train(folder, method, report_to, **options):
    config, trainer_class = METHODS[method]
    args = config(
        str(folder),
        **SMALL_RUN | {"max_steps": 3, "report_to": report_to, "learning_rate": 1e-4, "beta": 0.01} | options,
        max_completion_length=160,
        num_generations=4,
        per_device_train_batch_size=8,
        num_completions_to_log=KEPT,
    )
    trainer = trainer_class(
        testbed.load_model(),
        args=args,
        train_dataset=testbed.load_dataset("easy"),
        processing_class=testbed.load_tokenizer(),
    )
    tables = []
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, TrackerCallback))
    rows = callback._rows
    callback._rows = lambda step: tables.append(rows(step)) or tables[-1]
    trainer.train()
    return trainer, tables


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


def records_of(folder: Path):
    """Return the records of a finished run. The client's service may still be writing the last ones."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    deadline = time.monotonic() + 60
    while True:
        records = [Record.FromString(content) for content in _records(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, "the run has no end"
        time.sleep(0.1)


def items_of(record):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


@pytest.mark.parametrize("method", METHODS)
def test_wandb(offline, tmp_path, method):
    trainer, tables = train(tmp_path / "run", method, "wandb")
    folder = Path(wandb.run.dir).parent
    wandb.finish()
    records = records_of(folder)
    history = [items_of(record) for record in records if record.WhichOneof("record_type") == "history"]
    keys = {key for items in history for key in items}

    # Every number that the trainer logged is there, on the axis of updates.
    numbers = {f"train/{key}" for entry in trainer.state.log_history[:-1] for key in entry} - {"train/step"}
    assert numbers <= keys and f"train/{method}/steps/mean" in numbers
    defined = {
        record.metric.name or record.metric.glob_name: record.metric for record in records if record.metric.name
    }
    assert defined[f"train/{method}/steps/mean"].step_metric == "train/global_step"
    assert defined["train/rewards/math_accuracy_reward/mean"].summary.max

    # Completions of all logged steps, with their problems, solutions and verdicts.
    solutions = {as_text(row["prompt"]): row["solution"] for row in testbed.load_dataset("easy")}
    media = [items for items in history if "completions_log/table.path" in items]
    assert [items["train/global_step"] for items in media] == [1, 2, 3]
    assert (
        media[-1]["completions_log/table.log_mode"] == "INCREMENTAL" and media[-1]["completions_log/table.nrows"] == 9
    )
    logged = [json.loads((folder / "files" / items["completions_log/table.path"]).read_text()) for items in media]
    assert [len(table["data"]) for table in logged] == [KEPT] * 3
    for step, (table, meant) in enumerate(zip(logged, tables, strict=True), 1):
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert [row["step"] for row in rows] == [step] * KEPT
        assert [row["completion"] for row in rows] == meant["completion"].tolist()
        assert [row["advantage"] for row in rows] == pytest.approx(meant["advantage"].tolist())
        assert {"prompt", "math_accuracy_reward"} <= rows[0].keys()
        assert table["columns"][:5] == ["step", "prompt", "solution", "completion", "correct"]
        for row in rows:
            assert row["solution"] == solutions[row["prompt"]]
            assert row["correct"] == bool(row["math_accuracy_reward"] > 0.5)
        assert method == "sas" or {"exit", "probes", "steps"} <= rows[0].keys()

    # The same completions as pictures, with their advantages.
    page = (folder / "files" / media[-1]["completions_log/trace-1.path"]).read_text()
    texts = "".join(re.findall(r'<span class="(?:text|edge)[^>]*>([^<]*)', page))
    first_line = tables[-1]["completion"][0].splitlines()[0]
    assert first_line in texts and "advantage: " in page and "update 3, completion 1" in page
    assert ("probe 1" in page) or method == "sas"
    first = tables[-1].iloc[0]
    for name, text in (("problem", first["prompt"]), ("solution", first["solution"])):
        assert re.search(f'<div class="body {name}">([^<]*)</div>', page)[1] == escape(text)
    assert re.search('<span class="verdict[^>]*>([^<]*)', page)[1] == (
        "correct" if first["correct"] else "not correct"
    )

    for name in ("confidence", "steps"):
        assert sum(media[-1][f"train/{method}/{name}/histogram.values"]) > 0

    config = {
        item.key: json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert config["method"] == trainer._name and config["symbols"]["G"] == 4
    assert config["symbols"]["r" if method == "sas" else "delta"] in (0.3, 0.95)

    # The workspace draws nothing that is not there.
    charts = merged_charts([type(trainer)])
    own = {f"train/{key}" for plots in charts.values() for plot in plots.values() for key in plot}
    assert f"train/{method}/steps/mean" in own
    sometimes = {"train/sas/tokens_zeroed/failed", "train/sas/tokens_rewarded/failed"}  # where there are failed ones
    assert own - sometimes <= keys


def test_the_workspace_shows_what_matters_first():
    workspace = wandb_workspace("team", "project", [StepGRPOTrainer, SASTrainer])
    assert [section.name for section in workspace.sections] == [
        *("Efficient reasoning", "Completions", "Is it healthy?")
    ]
    assert workspace.sections[0].panels[0].y == ["train/rewards/math_accuracy_reward/mean"]
    steps = next(panel for panel in workspace.sections[0].panels if panel.title == "steps per completion")
    assert steps.y == ["train/step_grpo/steps/mean", "train/step_grpo/steps/correct_mean", "train/sas/steps/mean"]
    workspace._to_model()  # what `save()` would send


def test_a_run_that_was_not_opened_is_left_alone(tmp_path, monkeypatch):
    """`report_to` without wandb: a run of the user's own gets nothing."""
    monkeypatch.setattr(wandb, "log", None)
    monkeypatch.setattr(wandb, "init", None)
    train(tmp_path, "step_grpo", "none", max_steps=1)


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    _, tables = train(tmp_path / "run", "step_grpo", "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"), {"histograms": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"train/step_grpo/exit_rate", "train/completions/mean_length"} <= set(tags["scalars"])
    histograms = events.Histograms("train/step_grpo/confidence/histogram")
    assert [event.step for event in histograms] == [1, 2, 3] and histograms[0].histogram_value.num > 0
    texts = events.Tensors("completions_log/table/1/text_summary")
    assert [event.step for event in texts] == [1, 2, 3]
    shown = texts[-1].tensor_proto.string_val[0].decode()
    first = tables[-1].iloc[0]
    assert first["completion"].splitlines()[0] in shown
    for name in ("prompt", "solution", "correct"):
        assert f"    {name}: {first[name]}\n" in shown


def test_trackio(tmp_path):
    """In a process of its own, with which the server that Trackio starts ends."""
    script = Path(__file__).with_name("tracked_training.py")
    status, output = run_preloaded([str(script), str(tmp_path)], tmp_path / "output")
    assert status == 0, output[-3000:]
    assert "skipped metric" not in output
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"')))
    assert found["tables"] == [KEPT] * 3
    assert {"train/step_grpo/exit_rate", "train/step_grpo/confidence/histogram", "completions_log/trace-1"} <= set(
        found["keys"]
    )


def test_a_column_that_a_reward_function_logs_is_its_own(tmp_path):
    def reward(completions, log_extra, **kwargs):
        log_extra("correct", ["perhaps"] * len(completions))
        return [1.0] * len(completions)

    args = SASConfig(str(tmp_path), **SMALL_RUN, num_generations=4, max_completion_length=16)
    trainer = SASTrainer(
        testbed.load_model(),
        reward,
        args,
        testbed.load_dataset("easy").remove_columns("solution"),
        processing_class=testbed.load_tokenizer(),
    )
    trainer.train()
    (callback,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, TrackerCallback))
    rows = callback._rows(1)
    assert set(rows["correct"]) == {"perhaps"} and "solution" not in rows
    assert rows["reward"].tolist() == [1.0] * len(rows) and rows.columns[0] == "step"


def test_text_of_conversations():
    assert as_text("abc") == "abc"
    assert as_text([{"role": "user", "content": "1 + 1?"}]) == "1 + 1?"
    assert as_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "system: s\n\nuser: u"
