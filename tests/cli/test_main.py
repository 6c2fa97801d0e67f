"""The command line: help, errors of its user in a line, and the testbed as a model."""

import inspect
import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import refused

import step_trl
from step_trl import testbed
from step_trl.cli import arguments, serve, user_errors
from step_trl.cli import train as train_module
from step_trl.cli.main import main
from step_trl.cli.train_help import groups, own_fields
from step_trl.rollout.engines import vllm_process
from step_trl.runtime.run_config import RunConfig
from step_trl.trainers import METHODS, StepGRPOConfig, StepSelection


PACKAGE = Path(step_trl.__file__).parent
COMMANDS = ("demo", "train", "distill", "eval", "report", "serve", "study")
SMALLEST = ["--output_dir", "nowhere", "--bf16", "false"]
TRAIN = ["train", "--trainer", "grpo", "--model", "testbed", "--dataset", "testbed", *SMALLEST]
EVAL = ["eval", "--model", "testbed", "--benchmarks", "testbed-easy", "--max-tokens", "40", "--report", "report"]
DISTILL = ["distill", "--model", "testbed", "--dataset", "testbed", *SMALLEST]


def test_help_starts_without_torch():
    """The help of every command: a user should not have to wait for it."""
    code = f"""
import sys
from step_trl.cli.main import main
for command in {COMMANDS}:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert not end.code
assert not {{"torch", "transformers", "trl"}} & sys.modules.keys()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--confidence_threshold" in told and "--help-all" in told and "--benchmarks" in told


@pytest.mark.parametrize(
    "kind",
    [
        *(kind for kind in vars(arguments).values() if getattr(kind, "__module__", None) == arguments.__name__),
        *(RunConfig, StepSelection, *(config for _, config in METHODS.values())),
    ],
)
def test_help_has_the_fields_of_each_configuration(kind):
    """The fields that are read from the source are those of the dataclass."""
    real = {one.name: one for one in fields(kind) if one.name in vars(kind).get("__annotations__", {})}
    file = Path(inspect.getfile(kind))
    assert file in {
        PACKAGE / group.file for group in groups() if group.classes is None or kind.__name__ in group.classes
    }
    found = {one.name: one for one in own_fields(file, (kind.__name__,))}
    assert found.keys() == real.keys()
    for name, one in found.items():
        assert one.help == real[name].metadata["help"]
        if one.default is not None and kind is not StepGRPOConfig:
            default = real[name].default
            assert one.default == repr(real[name].default_factory() if default is MISSING else default)


def test_help_of_an_evaluation_has_its_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    told = capsys.readouterr().out
    assert all(
        f"by default {default}" in " ".join(told.split()) for default in ("transformers", 1, 0.6, 0.95, 32768, 64)
    )


def test_help_is_about_a_trainer(capsys):
    main(["train", "--help"])
    everything = capsys.readouterr().out
    main(["train", "--help", "--trainer", "sas"])
    one = capsys.readouterr().out
    main(["distill", "--help"])
    distillation = capsys.readouterr().out
    for name, in_one, in_distill in (
        ("dataset", True, True), ("selection_ratio", True, False), ("weight_sync", True, False),
        ("confidence_threshold", False, False), ("per_problem", False, True),
    ):  # fmt: skip
        assert f"--{name} " in everything
        assert (f"--{name} " in one, f"--{name} " in distillation) == (in_one, in_distill)


def test_all_help_has_the_fields_of_trl(capsys):
    main(["train", "--help-all", "--trainer", "sas"])
    told = capsys.readouterr().out
    assert told.startswith("usage: step-trl train [--config RECIPE]")
    assert "--selection_ratio" in told and "--num_generations" in told and "--lora_r" in told
    with refused(capsys, "trainer: 'dapo' is not known"):
        main(["train", "--help-all", "--trainer", "dapo"])


def made(folder):
    """Create the files and folders that a user names by mistake."""
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "notes.txt").write_text("no recipe")
    (folder / "rows.jsonl").write_text(json.dumps({"riddle": "1 + 1"}) + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*EVAL, "--model", "empty"], "model: empty cannot be loaded: it has no readable config.json. Give a folder"),
        ([*EVAL, "--model", "broken"], "model: broken cannot be loaded: it has no readable config.json"),
        ([*EVAL, "--model", "./runs/nothing"], "model: ./runs/nothing cannot be loaded: "),
        ([*EVAL, "--benchmarks", "math5000"], "benchmarks: math5000 is not known. Choose from gsm8k, math500, "),
        ([*EVAL, "--benchmarks", "math500", "--source", "nowhere"], "source: nowhere/math500 is not a folder"),
        ([*EVAL, "--limit", "0"], "limit: 0 leaves no problems"),
        ([*EVAL, "--n", "0"], r"seeds: \[\] are not 0 different seeds"),
        ([*EVAL, "--seeds", "1", "1", "--n", "2"], r"seeds: \[1, 1\] are not 2 different seeds"),
        ([*EVAL, "--max-tokens", "5000"], "max_tokens: 5000 after a prompt of"),
        ([*EVAL, "--truncate", "1.2"], "truncate: 1.2 is not between 0 and 1"),
        ([*EVAL, "--vanilla", "empty"], "vanilla: empty holds no samples"),
        ([*EVAL, "--temperature", "-1"], "temperature: -1"),
        (["train"], f"trainer: None is not known. Set one of {', '.join(METHODS)}, distill"),
        (["train", "--config", "nowhere.yaml"], "config: there is no file nowhere.yaml"),
        (["train", "--config", "notes.txt"], "config: notes.txt is not a mapping"),
        (["train", "stray", *TRAIN[1:]], "stray"),
        ([*TRAIN, "--model", "empty"], "model: empty cannot be loaded"),
        ([*TRAIN, "--dataset", "empty"], "empty"),
        ([*TRAIN, "--dataset", "rows.jsonl"], "Unknown column layout: found riddle"),
        ([*TRAIN, "--dataset_split", "tests"], "split: 'tests' is not known"),
        ([*TRAIN, "--num_generations", "3", "--per_device_train_batch_size", "4"], "must be divisible by"),
        ([*TRAIN, "--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ([*TRAIN, "--bf16", "true"], "bf16: this machine has no GPU that computes in bfloat16.* Set bf16=False"),
        ([*DISTILL, "--model", "empty"], "model: empty cannot be loaded"),
        ([*DISTILL, "--n", "0"], "n: 0 is too small"),
        ([*DISTILL, "--bf16", "true"], "bf16: this machine has no GPU that computes in bfloat16.* Set bf16=False"),
        ([*DISTILL, "--config", "nowhere.yaml"], "config: there is no file nowhere.yaml"),
        (["report", "nowhere", "--output-dir", "out"], "runs: there is no folder nowhere"),
        (["report", "empty", "--output-dir", "out"], "empty contains no trainer_state.json"),
        (["study", "--arms", "dapo"], "the study has moved.* python benchmarks/study"),
        (["demo", "--problems", "0"], "problems: 0"),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else "",
)
def test_a_user_error_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made(tmp_path)
    with refused(capsys, message):
        main(arguments)


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config: there is no file nowhere\.yaml"):
        main(["train", "--config", "nowhere.yaml", "--debug"])
    with pytest.raises(ValueError, match="benchmarks: math5000 is not known"):
        main([*EVAL, "--benchmarks", "math5000", "--debug"])


def test_debug_with_a_value_is_a_field_of_transformers(monkeypatch):
    asked = []
    monkeypatch.setattr(train_module, "run_train", asked.append)
    main([*TRAIN, "--debug", "underflow_overflow"])
    assert asked[0][-4:] == ["--debug", "underflow_overflow", "--trainer=grpo", "--model_name_or_path=testbed"]


def bug_in_torch():
    torch.zeros(2) @ torch.zeros(3)


def bug_in_python():
    int("seven")


@pytest.mark.parametrize("bug", [bug_in_torch, bug_in_python])
def test_a_bug_is_no_user_error(bug, monkeypatch):
    monkeypatch.setattr(train_module, "run_train", lambda _: bug())
    with pytest.raises((RuntimeError, ValueError)):
        main(TRAIN)


def test_a_check_of_ours_is_one_even_behind_other_frames():
    try:
        step_trl.testbed.load_dataset("nowhere")
    except ValueError as error:
        assert user_errors.is_user_error(error) and user_errors.package_of(error) == "step_trl"


def test_the_testbed_is_a_model_to_evaluate(tmp_path, capsys):
    """Without training it first, and with all of its benchmarks under one name."""
    report = tmp_path / "report"
    arguments = ["--model", "testbed", "--benchmarks", "testbed", "--limit", "2", "--max-tokens", "60"]
    main(["eval", *arguments, "--report", str(report)])
    summary = pd.read_csv(report / "summary.csv", index_col="benchmark")
    assert summary.index.tolist() == [*(f"testbed-{split}" for split in testbed.EVALUATION_SPLITS), "overall"]
    assert "| testbed |" in (report / "summary.md").read_text() and "overall" in capsys.readouterr().out


def test_the_testbed_is_a_model_to_serve(monkeypatch):
    served = []

    class Server(vllm_process.VLLMServer):
        def start(self):
            served.append(self.command_line)

        def wait(self):
            return 0

    monkeypatch.setattr(serve, "VLLMServer", Server)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "testbed", "--max-model-len", "512"])
    assert f"--model {testbed.MODEL_DIR} " in served[0]
