"""`step-trl train`: recipes, flags, and what is refused before anything is loaded."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import DISTILL_RUN, SMALL_RUN, refused
from small_runs import flags as as_flags
from transformers import AutoModelForCausalLM

from step_trl import testbed
from step_trl.cli import stages, train
from step_trl.cli.main import main
from step_trl.cli.recipe import parse, read_recipe
from step_trl.cli.sources import load_rows
from step_trl.rollout.engines.vllm_process import free_port
from step_trl.trainers import METHODS


SMALL = SMALL_RUN | {
    "trainer": "grpo",
    "model_name_or_path": "testbed",
    "dataset": "testbed",
    "dataset_split": "easy",
    "max_completion_length": 32,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
}


def parsed(arguments):
    recipe, _, rest = read_recipe(arguments)
    return parse(recipe, rest)


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
    arguments, model, config = parsed(
        ["--config", str(recipe), "--dataset=testbed", "--learning-rate", "0.1", "--bf16", "0"]
    )
    assert (arguments.trainer, arguments.dataset, config.selection_ratio, config.learning_rate) == (
        "sas", "testbed", 0.7, 0.1,
    )  # fmt: skip
    assert model.model_name_or_path is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": "dapo"}, f"trainer: 'dapo' is not known. Set one of {', '.join(METHODS)}, distill"),
        (
            {"confidence_threshold": 0.9},
            "confidence_threshold: not an option of trainer 'grpo'. Drop it: .* 'step_grpo'",
        ),
        ({"max_completion_lenght": 5}, "max_completion_lenght: not an option.* Did you mean max_completion_length?"),
        ({"config": "nowhere.yaml"}, "config: there is no file nowhere.yaml"),
    ],
)
def test_what_is_refused(command, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("?", r"\?")):
        parsed(command(**options))


def test_unknown_keys_of_a_recipe_are_refused(tmp_path, command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("step_penality: 0.5\n")
    with pytest.raises(ValueError, match=r"step_penality: not an option.* Did you mean step_penalty\?"):
        parsed(["--config", str(recipe), *command(trainer="step_grpo")])
    recipe.write_text("step_penality: 0.5\nmax_prompt_length: 512\ntorch_dtype: bfloat16\n")
    with pytest.raises(ValueError, match=r"step_penality.*\n.*TRL no longer cuts prompts.*\n.*Set dtype\."):
        parsed(["--config", str(recipe), *command(trainer="step_grpo")])
    recipe.write_text("- a list")
    with pytest.raises(ValueError, match=r"config: .*recipe\.yaml is not a mapping"):
        parsed(["--config", str(recipe), *command()])


def test_recipes_make_no_python_objects(tmp_path, command, capsys):
    recipe, trace = tmp_path / "recipe.yaml", tmp_path / "trace"
    recipe.write_text(f"output_dir: !!python/object/apply:os.mkdir [{trace}]\n")
    with refused(capsys, "is not a YAML file of plain values.*python/object/apply"):
        main(["train", "--config", str(recipe), *command()])
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--config", str(recipe), "--dry-run", *command()])
    assert "python/object/apply" in capsys.readouterr().out
    assert not trace.exists()


def test_a_value_that_cannot_be_read_is_named_in_a_line(command):
    with pytest.raises(ValueError, match=r"^argument --learning_rate/--learning-rate: invalid float value: 'fast'$"):
        parsed(command(learning_rate="fast"))


@pytest.mark.timeout(300)
def test_two_processes_of_accelerate(tmp_path, command, preloaded_executable):
    """On the CPU, with gloo. `accelerate launch --cpu` would start only one process, so use `--multi_gpu`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: step_grpo\nnum_generations: 4\nper_device_train_batch_size: 2\n")
    flags = command()
    for name in ("--trainer", "--num_generations", "--per_device_train_batch_size"):
        del flags[flags.index(name) : flags.index(name) + 2]
    launch = [
        preloaded_executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    train_command = [*launch, "-m", "step_trl", "train", "--config", str(recipe), *flags]
    run = subprocess.run(train_command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    (logged, _) = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert logged["step"] == 1 and logged["num_tokens"] > 4 * 20  # of four completions, which are one group of both
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_rows(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    flags = ["--trainer", "grpo", "--dataset", str(file), "--prompt_template", "{problem} =", "--bf16", "0"]
    (row,) = load_rows(parsed([*flags, "--token_targets", "7", "7"])[0])
    assert row == {
        "prompt": [{"role": "user", "content": "1 + 1 = Think for 7 tokens."}],
        "solution": "2",
        "target_tokens": 7,
    }
    with pytest.raises(ValueError, match=r"token_targets: \[7\] are not two"):
        load_rows(parsed([*flags, "--token_targets", "7"])[0])


def test_a_run_is_never_overwritten_and_goes_on(tmp_path, command, capsys):
    main(["train", *command(save_strategy="steps", save_steps=1)])
    folder = tmp_path / "run"
    assert {"model.safetensors", "trainer_state.json", "checkpoint-1"} <= {path.name for path in folder.iterdir()}
    with refused(capsys, r"output_dir: .* holds an earlier run.*--resume_from_checkpoint true"):
        main(["train", *command()])
    main(["train", *command(max_steps=2, resume_from_checkpoint="true")])
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]


def test_a_model_is_needed(command, capsys):
    flags = command()
    del flags[flags.index("--model_name_or_path") : flags.index("--model_name_or_path") + 2]
    with refused(capsys, "model_name_or_path: not set"):
        main(["train", *flags])


def test_stages_are_trained_one_after_another_and_once(tmp_path, command, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "max_steps: 2\nstages:\n"
        "- {max_completion_length: 40, learning_rate: 1.0e-2}\n"
        "- {max_completion_length: 24, learning_rate: 0.0, system_prompt: Within 24 tokens.}\n"
    )
    flags = command(save_strategy="steps", save_steps=1)
    for name in ("--max_completion_length", "--max_steps"):
        del flags[flags.index(name) : flags.index(name) + 2]
    built = []
    original = stages.build_trainer

    def recording(*parsed):
        trainer = original(*parsed)
        built.append(trainer)
        return trainer

    monkeypatch.setattr(stages, "build_trainer", recording)
    folder = train.run_train(["--config", str(recipe), *flags])
    first, second = built
    assert folder == tmp_path / "run" / "stage-2"
    assert (first.args.max_completion_length, second.args.max_completion_length) == (40, 24)
    assert second.train_dataset[0]["prompt"][0] == {"role": "system", "content": "Within 24 tokens."}
    vanilla = testbed.load_model().state_dict()
    after_first, after_second = (
        load_file(tmp_path / "run" / f"stage-{number}" / "model.safetensors") for number in (1, 2)
    )
    assert any((after_first[name] != vanilla[name]).any() for name in after_first)
    assert all(
        torch.equal(after_first[name], after_second[name]) for name in after_first
    )  # the second learned nothing

    # The second stage was stopped after its first update: the first is left alone, the second goes on.
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "trainer_state.json").unlink()
    assert train.run_train(["--config", str(recipe), *flags]) == folder
    assert len(built) == 3
    assert [entry["step"] for entry in built[2].state.log_history if "loss" in entry] == [1, 2]
    assert train.run_train(["--config", str(recipe), *flags]) == folder and len(built) == 3


def test_a_stage_goes_on_with_the_adapter_of_the_one_before(tmp_path, command):
    """The stages are LAPO's, as the second one reads a file of the first one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n- lapo_stage: discovery\n- lapo_stage: internalization\n")
    lora = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0, "learning_rate": 1e-2}
    arguments = ["--config", str(recipe), *command(trainer="lapo", **lora)]
    second = train.run_train(arguments)
    first = second.with_name("stage-1")
    merged = first / "merged"
    assert [path.name for path in first.iterdir() if path.suffix == ".safetensors"] == ["adapter_model.safetensors"]
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(merged)
    assert not (first / ".merged.partial").exists()

    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(testbed.load_model(), first)(ids).logits
        whole, vanilla = (AutoModelForCausalLM.from_pretrained(at)(ids).logits for at in (merged, testbed.MODEL_DIR))
    torch.testing.assert_close(whole, adapted, rtol=1e-3, atol=1e-3)
    assert (whole - vanilla).abs().max() > 0.1

    shutil.rmtree(second)
    (first / "adapter_model.safetensors").unlink()  # is not merged again
    assert train.run_train(arguments) == second and (second / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", [["train"], ["distill"]])
def test_distillation_is_a_recipe(tmp_path, monkeypatch, command):
    """By `train` and by `distill`, which is short for `train --trainer distill`."""
    recipe = tmp_path / "recipe.yaml"
    fields = {"learning_rate": 1e-3, "num_train_epochs": 2, "model_init_kwargs": {"use_cache": False}}
    recipe.write_text(json.dumps(DISTILL_RUN | fields | ({"trainer": "distill"} if command == ["train"] else {})))
    asked = []
    monkeypatch.setattr(stages, "distill", lambda *parts: asked.append(parts))
    folder = tmp_path / "run"
    arguments = ["--config", str(recipe), "--output_dir", str(folder), "--n", "3", "--no_dataloader_pin_memory"]
    main([*command, *arguments, "--urls", "http://a", "http://b", "--model", "other"])
    ((arguments, model, config),) = asked
    given = ("dataset", "dataset_split", "limit", "max_tokens", "engine")
    assert {name: getattr(arguments, name) for name in given} == {name: DISTILL_RUN[name] for name in given}
    assert (arguments.trainer, arguments.n, arguments.urls) == ("distill", 3, ["http://a", "http://b"])
    defaults = (arguments.per_problem, arguments.confidence, arguments.temperature, arguments.require_end_of_thinking)
    assert defaults == (1, 0.95, 1.0, True)
    assert (model.model_name_or_path, model.dtype) == ("other", "float32")
    assert (config.output_dir, config.learning_rate, config.num_train_epochs) == (str(folder), 1e-3, 2)
    assert not config.dataloader_pin_memory and config.model_init_kwargs == {"use_cache": False}
    # Not the defaults of SFTConfig.
    assert (config.lr_scheduler_type, config.warmup_steps, config.seed, config.max_length) == ("cosine", 0.1, 0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 5}, "num_generations: not an option of trainer 'distill'. Set n."),
        ({"max_completion_length": 5}, "max_completion_length: not an option of trainer 'distill'. Set max_tokens."),
        ({"epsilon": 0.2}, "epsilon: not an option.* Drop it: it is one of 'grpo', 'step_grpo', 'sas'"),
        ({"max_tokns": 5}, "max_tokns: not an option.* Did you mean max_tokens?"),
        ({"engine": "vlm"}, "engine: 'vlm' is not known. Set 'transformers' or 'vllm'"),
        ({"per_problem": 0}, "per_problem: 0 is too small. Set at least 1"),
    ],
)
def test_what_is_refused_of_a_distillation(options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        train.run_train(as_flags(DISTILL_RUN | {"trainer": "distill"} | options))


def test_stages_may_be_of_different_kinds(tmp_path):
    """GRPO, then a distillation of its model."""
    shared = SMALL_RUN | {"model_name_or_path": "testbed", "dtype": "float32", "dataset": "testbed"}
    shared |= {"dataset_split": "easy", "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "run")}
    rollouts = {"trainer": "grpo", "num_generations": 4, "max_completion_length": 32, "learning_rate": 1e-3}
    samples = {"trainer": "distill", "limit": 4, "n": 2, "max_tokens": 300}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(shared | {"stages": [rollouts, samples]}))
    folder = train.run_train(["--config", str(recipe)])
    assert folder == tmp_path / "run" / "stage-2" and train.is_done(folder)
    assert (folder / "kept.parquet").exists()
    made_with = json.loads((folder / "samples" / "settings.json").read_text())["model"]
    assert made_with.startswith("stage-1 (")


def test_stages_are_a_list(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: 3\n")
    with pytest.raises(ValueError, match="stages: 3 is not a list of mappings"):
        read_recipe([f"--config={recipe}"])
