"""`step-trl train`: recipes, flags, and what is refused before anything is loaded."""

import json

import pytest
from small_runs import SMALL_RUN

from step_trl.cli import main
from step_trl.train import load_rows, parse


SMALL = SMALL_RUN | {
    "trainer": "grpo",
    "model_name_or_path": "testbed",
    "dataset": "testbed",
    "max_completion_length": 32,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
}


@pytest.fixture
def command(tmp_path):
    """`command(max_steps=2)`: flags of the smallest run, with these on top."""

    def command(**options):
        everything = SMALL | {"output_dir": tmp_path / "run"} | options
        return [text for name, value in everything.items() for text in (f"--{name}", str(value))]

    return command


def test_a_recipe_is_overridden_by_flags(tmp_path, command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: sas\nselection_ratio: 0.7\nlearning_rate: 0.5\ndataset: other\n")
    arguments, model, config = parse(
        ["--config", str(recipe), "--dataset=testbed", "--learning-rate", "0.1", "--bf16", "0"]
    )
    assert (arguments.trainer, arguments.dataset, config.selection_ratio, config.learning_rate) == (
        "sas", "testbed", 0.7, 0.1,
    )  # fmt: skip
    assert model.model_name_or_path is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": "dapo"}, "trainer: 'dapo' is not known. Set one of grpo, step_grpo, sas"),
        ({"confidence_threshold": 0.9}, "confidence_threshold: no option of trainer 'grpo'"),
        ({"max_completion_lenght": 5}, "max_completion_lenght: no option.* Did you mean max_completion_length?"),
        ({"config": "nowhere.yaml"}, "config: there is no file nowhere.yaml"),
    ],
)
def test_what_is_refused(command, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("?", r"\?")):
        parse(command(**options))


def test_unknown_keys_of_a_recipe_are_refused(tmp_path, command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("step_penality: 0.5\n")
    with pytest.raises(ValueError, match=r"step_penality: no option.* Did you mean step_penalty\?"):
        parse(["--config", str(recipe), *command(trainer="step_grpo")])
    recipe.write_text("- a list")
    with pytest.raises(ValueError, match=r"config: .*recipe\.yaml is no mapping"):
        parse(["--config", str(recipe), *command()])


def test_rows(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    flags = ["--trainer", "grpo", "--dataset", str(file), "--prompt_template", "{problem} =", "--bf16", "0"]
    (row,) = load_rows(parse([*flags, "--token_targets", "7", "7"])[0])
    assert row == {
        "prompt": [{"role": "user", "content": "1 + 1 = Think for 7 tokens."}],
        "solution": "2",
        "target_tokens": 7,
    }
    with pytest.raises(ValueError, match=r"token_targets: \[7\] are not two"):
        load_rows(parse([*flags, "--token_targets", "7"])[0])


def test_a_run_is_never_overwritten_and_goes_on(tmp_path, command):
    main(["train", *command(save_strategy="steps", save_steps=1)])
    folder = tmp_path / "run"
    assert {"model.safetensors", "trainer_state.json", "checkpoint-1"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"output_dir: .* holds an earlier run.*--resume_from_checkpoint true"):
        main(["train", *command()])
    main(["train", *command(max_steps=2, resume_from_checkpoint="true")])
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]


def test_a_model_is_needed(command):
    flags = command()
    del flags[flags.index("--model_name_or_path") : flags.index("--model_name_or_path") + 2]
    with pytest.raises(ValueError, match="model_name_or_path: there is none"):
        main(["train", *flags])


def test_help_lists_the_fields(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--confidence_threshold" in capsys.readouterr().out
