"""What the blocks of the GPU campaign share, and how they stop and go on. The scripts run in another test."""

import argparse
import json
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from gpu import block, chains, wheels
from gpu.correctness import Precision, Scored, compare_greedy
from gpu.larger_testbed import train
from gpu.pretraining import Pretraining, Recipe

from step_trl import testbed
from step_trl.testbed.problems import parse_expression


def make_block(folder, minutes=1.0, **settings):
    return block.Block("block", argparse.Namespace(output_dir=folder, minutes=minutes), settings)


def test_a_block_keeps_its_rows_and_goes_on_with_the_others(tmp_path, capsys):
    first = make_block(tmp_path)
    first.measure("a", lambda: {"value": 1.5})
    with pytest.raises(SystemExit, match="b failed"):
        first.measure("b", lambda: 1 / 0)
        first.finish()
    again = make_block(tmp_path)
    again.measure("a", lambda: pytest.fail("is there"))
    again.measure("b", lambda: {"value": float("nan"), "other": None})
    again.finish()
    written = json.loads((tmp_path / "block.json").read_text())
    assert list(written["rows"]) == ["a", "b"] and written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "block.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--output-dir: .*block.json has rows of"):
        make_block(tmp_path, other=1)


def test_a_block_starts_no_row_that_its_time_is_too_short_for(tmp_path, capsys):
    late = make_block(tmp_path, minutes=0.0)
    late.measure("a", lambda: pytest.fail("no time"))
    late.finish()
    assert "No time was left for a." in capsys.readouterr().out

    def interrupted():
        raise block.OutOfTime

    stopped = make_block(tmp_path)
    stopped.measure("a", interrupted)
    stopped.measure("b", lambda: pytest.fail("no time"))
    assert stopped.left == ["a", "b"] and not stopped.failed


@pytest.mark.parametrize("name", ["0.6B", "1.7B"])
def test_shapes_have_the_sizes_of_the_published_models(name):
    with torch.device("meta"):
        parameters = block.AutoModelForCausalLM.from_config(block.SHAPES[name]).num_parameters()
    assert parameters / 1e9 == pytest.approx(float(name[:-1]), abs=0.03)


def test_random_weights_are_the_same_in_each_dtype():
    exact, rounded = (block.build_model("toy", dtype).state_dict() for dtype in ("float64", "bfloat16"))
    assert all(torch.equal(exact[name].to(torch.bfloat16), weight) for name, weight in rounded.items())


def test_greedy_completions_that_differ_are_compared_up_to_there(monkeypatch):
    from gpu import correctness

    by_engine = [[1, 2, 3], [4, 5, 6]], [[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]]
    by_generate = [[1, 2, 3], [4, 7, 6]], [[-1.0, -1.25, -1.0], [-2.5, -9.0, -9.0]]
    monkeypatch.setattr(correctness, "greedy_by_engine", lambda *_: by_engine)
    monkeypatch.setattr(correctness, "greedy_by_generate", lambda *_: by_generate)
    row = compare_greedy("toy", Precision(), 2, 3)
    assert row["equal"] == 4 / 6 and row["log-probability, max"] == 0.5
    assert row["log-probability, mean"] == pytest.approx(0.75 / 4)


def test_what_sas_selects_of_a_completion():
    scored = Scored(torch.tensor([-1.0, -1.0, -0.1, -0.1]), torch.tensor([0, 0, 1, 1]))
    assert scored.confidences.tolist() == pytest.approx([-1.0, -0.1])
    assert scored.selected.tolist() == [0.0, 0.0, 1.0, 1.0]  # the unsure step of a correct completion


def test_longer_chains_are_right_and_are_no_evaluation_problems():
    evaluated = chains.evaluated_expressions()
    rows = chains.TRAIN.distinct(200, 5, evaluated)
    assert not evaluated & {row["expression"] for row in rows} and len({row["expression"] for row in rows}) == 200
    for row in rows:
        terms = parse_expression(row["expression"])
        assert str(sum(terms)) == row["solution"] and 3 <= len(terms) <= 10 and max(map(abs, terms)) < 100
    sets = chains.evaluation_sets(300)
    assert {name: len(found) for name, found in sets.items()} == dict.fromkeys(
        ("hard", "unseen", "long", "longest"), 256
    )
    corpus = chains.LongerCorpus(1)
    assert all(piece.text for piece in islice(corpus.scripted_trace(), 5))


def tiny_recipe(seconds):
    return Recipe(
        seconds, hidden_size=16, layers=1, heads=1, batch_tokens=256, drawn_at_once=4, tokenizer_texts=60, seed=1
    )


def test_a_pre_training_and_a_training_stop_in_time_and_resume(tmp_path):
    folder = tmp_path / "pretrained"
    assert not Pretraining(tiny_recipe(0.5), folder).run(0.0)
    first = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]
    again = Pretraining(tiny_recipe(0.5), folder)
    assert again.run(60.0) and again.progress.calls == 2 and again.progress.updates > first["updates"] == 1
    assert [file.name for file in folder.iterdir()] == ["model"]
    assert Pretraining(tiny_recipe(0.5), folder).run(0.0)

    options = {"max_steps": 2, "max_completion_length": 8, "per_device_train_batch_size": 8}
    options |= {"gradient_accumulation_steps": 1, "disable_tqdm": True}
    with pytest.raises(block.OutOfTime):
        train("sas", again.model_dir, tmp_path / "sas", time.monotonic(), **options)
    assert (tmp_path / "sas" / "checkpoint-1").exists()
    train("sas", again.model_dir, tmp_path / "sas", time.monotonic() + 60, **options)
    state = json.loads((tmp_path / "sas" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and len(state["log_history"]) >= 2
    train("sas", again.model_dir, tmp_path / "sas", time.monotonic(), **options)  # is done


def test_wheels_are_what_a_machine_with_the_named_packages_lacks():
    bare, equipped = wheels.missing([], "3.12"), wheels.missing(["pyarrow", "pandas"], "3.12")
    assert {"trl", "datasets", "math-verify", "pyarrow", "pandas"} <= bare.keys()
    assert not {"torch", "numpy", "transformers", "step-trl", "reasoning-gym"} & bare.keys()
    assert not {"pyarrow", "pandas", "python-dateutil"} & equipped.keys() and equipped.items() <= bare.items()
    with pytest.raises(SystemExit, match="nonsense: is not installed here"):
        wheels.missing(["nonsense"], "3.12")


def test_wheels_that_are_too_large_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "tree_bytes", lambda: 2 * 2**20)
    (tmp_path / "large-1.0-py3-none-any.whl").write_bytes(bytes(2**20))
    wheels.check_size(tmp_path, 3.0)
    assert "1.0 MiB of wheels and 2.0 MiB of the tree" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"more than 2.9 MiB.*--present: large"):
        wheels.check_size(tmp_path, 2.9)


def test_wheels_are_installed_without_a_network(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has no wheels"):
        wheels.install(tmp_path, tmp_path / "site")
    (tmp_path / "one-1.0-py3-none-any.whl").touch()
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    wheels.install(tmp_path, tmp_path / "site")
    (command,) = commands
    assert command[0] == sys.executable and {"--no-index", "--no-deps"} < set(command)


def test_the_testbed_model_does_not_end():
    assert block.build_model(block.TESTBED, "float32").generation_config.eos_token_id is None
    assert testbed.load_model().generation_config.eos_token_id is not None
