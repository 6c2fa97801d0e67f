"""`step-trl train --dry-run`: the plan is what the trainer then does, and all errors are reported at once."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from small_runs import DISTILL_RUN, TESTBED_RUN, flags
from transformers import AutoConfig
from trl import GRPOConfig, ModelConfig

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer, testbed
from step_trl.cli.arguments import DistillArguments, FineTuningConfig, TrainArguments
from step_trl.cli.dry_run import checks
from step_trl.cli.dry_run.batches import Batches
from step_trl.cli.main import main
from step_trl.cli.recipe import DISTILL_FIELDS, OBSOLETE_FIELDS, parse_values, read_recipe, unknown_fields
from step_trl.trainers import METHODS


RECIPES = Path(__file__).parents[3] / "recipes"
RUN = TESTBED_RUN | {"dataset_split": "train"}
SMALL = RUN | {"trainer": "grpo"}


@pytest.fixture
def dry_run(capsys, monkeypatch):
    """`dry_run(*arguments)`: exit status, and what is printed. No weights are loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    def dry_run(*arguments):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
            main(["train", "--dry-run", *map(str, arguments)])
        return end.value.code, capsys.readouterr().out

    return dry_run


@pytest.mark.parametrize("name", ["step_grpo/paper", "step_grpo/s_grpo", "sas/thinkprune", "sas/l1_max", "sas/lapo"])
def test_a_dry_run_of_a_recipe(name, tmp_path, dry_run):
    path = RECIPES / f"{name}.yaml"
    options = RUN | {"output_dir": tmp_path / "run", "max_steps": 30}
    status, text = dry_run("--config", path, *flags(options))
    assert status == 0, text
    assert not (tmp_path / "run").exists() and not torch.cuda.is_initialized()
    stages = len(read_recipe(["--config", str(path)])[1])
    assert text.count("all known") == stages
    for number in range(1, stages + 1) if stages > 1 else []:
        assert f"Stage {number} of {stages}" in text and f"run/stage-{number}" in text
    text = " ".join(text.split())
    assert "4,096 rows of prompt, solution" in text and "1,185,216 parameters" in text
    assert "10 completions are generated at once (prompts: 2, of each: 5) by 1 process" in text
    assert "30 of 10 completions each: 300 completions, 0.015 epochs" in text
    expected = {
        "step_grpo/paper": "rollouts end at Wait, Alternatively when an answer is more confident than 0.95",
        "step_grpo/s_grpo": "groups are exits from one thought",
        "sas/thinkprune": "system prompt 'Think, then answer, within 2000 tokens.'",
        "sas/l1_max": "prompts ask for at most 100 to 4,000 tokens",
        "sas/lapo": "1 lapo_internalization",
    }
    assert expected[name] in text


def test_a_dry_run_of_a_distillation(tmp_path, dry_run):
    options = DISTILL_RUN | {"output_dir": tmp_path / "run"}
    recipe = RECIPES / "step_grpo" / "deer_sft.yaml"
    status, text = dry_run("--config", recipe, *flags(options))
    assert status == 0 and not (tmp_path / "run").exists(), text
    text = " ".join(text.split())
    assert "2 completions of each problem of at most 200 tokens" in text
    assert "3 epochs, updates of 4 completions by 1 process, learning rate 1e-05 cosine" in text
    assert "testbed (easy): 8 of 256 rows are sampled" in text

    wrong = {"num_generations": 5, "n": 0, "dataset": tmp_path, "eval_strategy": "epoch"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    status, text = dry_run("--config", recipe, *flags(options | wrong))
    assert status == 1
    for message in (
        "num_generations: not an option of trainer 'distill'. Set n.",
        "n: 0 is too small. Set at least 1.",
        f"output_dir: {tmp_path / 'run'} holds a model",
        "data: ",
    ):
        assert message in text.split("Wrong:")[1], message
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(DISTILL_RUN | {"trainer": "distill", "stages": [{"n": 2}, {"n": 4}]}))
    status, text = dry_run("--config", recipe, "--output_dir", tmp_path / "new")
    assert status == 0 and "that of stage 1" in text and f"{tmp_path / 'new' / 'stage-2'}" in text


def test_a_dry_run_says_all_that_is_wrong_at_once(tmp_path, dry_run, monkeypatch):
    monkeypatch.setattr(checks, "SERVER_SECONDS", 0.2)
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"riddle": "1 + 1", "answer": "2"}) + "\n")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    wrong = {
        "max_prompt_length": 512, "epsilon_hihg": 0.3, "learning_rate": "fast", "dataset": problems,
        "num_generations": 3, "beta": 0.1, "sync_ref_model": True, "length_reward": "short", "report_to": "mlfow",
        "max_completion_length": 5000, "use_vllm": True, "vllm_mode": "server", "weight_sync": "disk",
        "vllm_server_base_url": ["http://127.0.0.1:9", "http://127.0.0.1:10"], "output_dir": tmp_path / "run",
    }  # fmt: skip
    status, text = dry_run(*flags(SMALL | wrong))
    assert status == 1
    for message in (
        "max_prompt_length: not an option of trainer 'grpo'. TRL no longer cuts prompts",
        "epsilon_hihg: not an option of trainer 'grpo'. Did you mean epsilon_high?",
        "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        "Unknown column layout: found riddle, answer",
        "num_generations: the 10 completions of a generation",
        "length_reward: 'short' is not known",
        "http://127.0.0.1:9",
        "http://127.0.0.1:10",
        f"output_dir: {tmp_path / 'run'} holds an earlier run",
    ):
        assert message in text.split("Wrong:")[1], message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "nowhere.yaml"}, "config: there is no file nowhere.yaml"),
        ({"trainer": "dapo"}, "trainer: 'dapo' is not known"),
        ({"max_completion_length": 1010}, "prompt of row .* tokens; with max_completion_length=1010 it does not fit"),
        ({"per_device_train_batch_size": 20_500}, "dataset: its 4096 rows are fewer than the 4100 prompts"),
        ({"report_to": "mlflow"}, "report_to: mlflow is not installed"),
        ({"eval_strategy": "steps"}, "eval_strategy: 'steps' needs rows to evaluate on"),
        ({"length_reward": "l1_max"}, "length_reward='l1_max' needs a column 'target_tokens'"),
        ({"trainer": "lapo", "lapo_stage": "internalization"}, "lapo_lengths: there is no file"),
    ],
)
def test_what_a_dry_run_finds(options, message, tmp_path, dry_run):
    status, text = dry_run(*flags(SMALL | {"output_dir": tmp_path / "run"} | options))
    assert status == 1 and re.search(message, text.split("Wrong:")[-1]), text


def test_one_process_plans_for_many(tmp_path, dry_run):
    options = flags(SMALL | {"output_dir": tmp_path / "run"})
    status, text = dry_run("--num-processes", 8, *options)
    assert status == 0 and "80 completions are generated at once (prompts: 16, of each: 5) by 8 processes" in text
    fsdp2 = RECIPES / "accelerate_configs" / "fsdp2.yaml"
    for processes, given in ((8, []), (4, ["--num_processes", 4])):
        status, text = dry_run("--accelerate-config", fsdp2, *given, *options)
        assert status == 0 and f"by {processes} processes" in text
    status, text = dry_run("--num-processes", 3, *options, "--num_generations", 4)
    assert status == 1 and "per_device_train_batch_size=10 x steps_per_generation=1 x 3 processes" in text
    assert dry_run("--num-processes", 0)[1].startswith("--num-processes: 0 is not positive.")
    assert dry_run("--accelerate-config", "nowhere.yaml")[1].startswith("--accelerate-config: there is no file")


def test_the_last_words_do_not_say_more_than_was_checked(tmp_path, dry_run, monkeypatch):
    on_gpu = flags(SMALL | {"output_dir": tmp_path / "run", "use_cpu": False})
    status, text = dry_run(*on_gpu)
    assert status == 0 and "give --gpu-memory" in text and "All of this was checked" not in text
    status, text = dry_run(*on_gpu, "--gpu-memory", 1)
    assert (
        status == 0
        and "of 1.0 GiB of a GPU" in text
        and text.endswith("All of this was checked. Nothing was trained.\n")
    )
    status, text = dry_run(*on_gpu, "--gpu-memory", 0.01)
    assert status == 1 and "All of this" not in text
    wrong = " ".join(text.split("Wrong:")[1].split())
    assert "It does not fit 10.2 MiB of a GPU, of which 10% are left for what is not counted" in wrong
    saved = [
        float(count) for count in re.findall(r"\(saves ([\d.]+) MiB\)", wrong.split("Each of these lowers it:")[1])
    ]
    assert len(saved) > 3 and saved == sorted(saved, reverse=True)
    monkeypatch.chdir(tmp_path)
    status, text = dry_run(*flags(SMALL))
    assert status == 0 and "of this machine" in text and "All of this was checked" in text
    assert re.search(r"^ *output +trainer_output$", text, re.MULTILINE)


def test_the_layout_is_for_dry_runs_only(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--gpu-memory", "80", *flags(SMALL)])
    assert "--gpu-memory: for --dry-run only" in capsys.readouterr().err


def test_the_first_of_many_processes_speaks_in_a_dry_run(tmp_path, dry_run, monkeypatch):
    """Started as by `accelerate launch`. No process waits for another, so that one can plan for many."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "1")
    assert dry_run("--config", "nowhere.yaml") == (0, "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    status, text = dry_run(*flags(SMALL | {"output_dir": tmp_path / "run"}))
    assert status == 0 and "80 completions are generated at once (prompts: 16, of each: 5) by 8 processes" in text


@pytest.mark.timeout(300)
def test_a_dry_run_asks_the_server(tmp_path, dry_run, vllm_server):
    server = {"use_vllm": True, "vllm_mode": "server", "weight_sync": "disk", "vllm_server_base_url": vllm_server.url}
    options = SMALL | server | {"output_dir": tmp_path / "run"}
    status, text = dry_run(*flags(options))
    assert status == 0 and f"{vllm_server.url}: the policy's tokenizer" in text and "KV cache" not in text
    assert "weights by disk" in text
    status, text = dry_run(*flags(options | {"weight_sync": "nccl", "rollouts_ahead": 1}))
    assert status == 0 and "weights by nccl, the next batch is sampled during an update" in " ".join(text.split())


@pytest.mark.timeout(300)
def test_a_dry_run_finds_a_server_that_is_another_one(tmp_path, dry_run, mortal_server):
    shutil.copytree(testbed.MODEL_DIR, tmp_path / "larger", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoConfig.from_pretrained(testbed.MODEL_DIR, hidden_size=256).save_pretrained(tmp_path / "larger")
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": mortal_server.url}
    options = SMALL | server | {"output_dir": tmp_path / "run"}
    status, text = dry_run(*flags(options))
    assert status == 1 and f"weight_sync: {mortal_server.url} has no weight-transfer engine" in text
    status, text = dry_run(*flags(options | {"model_name_or_path": tmp_path / "larger"}))
    assert status == 1 and "vocab_size 463 instead of hidden_size 256" in text


@pytest.mark.parametrize(
    ("sizes", "epochs"),
    [
        ({"per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 2}, 1.5),
        ({"per_device_train_batch_size": 10, "steps_per_generation": 3, "num_generations": 5}, 1),
        ({"per_device_train_batch_size": 4, "generation_batch_size": 16, "num_iterations": 2}, 0.3),
    ],
)
def test_batches_and_updates_are_those_of_the_trainer(sizes, epochs, tmp_path):
    rows = testbed.load_dataset("train").select(range(50))
    small = {name: value for name, value in SMALL.items() if name in {one.name for one in fields(GRPOConfig)}}
    for name in ("steps_per_generation", "gradient_accumulation_steps", "num_generations", "max_steps"):
        small.pop(name)
    args = EfficientReasoningConfig(str(tmp_path), **small | sizes, num_train_epochs=epochs)
    trainer = EfficientReasoningTrainer(
        testbed.load_model(), args=args, train_dataset=rows, processing_class=testbed.load_tokenizer()
    )
    given = [f"--{name}={value}" for name, value in (small | sizes).items()]
    values, wrong = parse_values("grpo", {"dataset": "testbed", "output_dir": "x"}, given)
    assert not wrong
    batches = Batches.of(values, 1)
    assert batches.generation == args.generation_batch_size and batches.num_generations == args.num_generations
    found = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert batches.updates(len(rows), -1, epochs) == found[-1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"generation_batch_size": 20, "steps_per_generation": 2}, "Set only one of the two"),
        ({"generation_batch_size": 15}, "generation_batch_size: 15 is not a multiple of 10"),
        ({"num_generations": 1}, "num_generations: 1 is too small a group"),
        ({"num_generations": 4}, "per_device_train_batch_size=5 x steps_per_generation=1 x 2 processes"),
        ({"num_generations": 10, "trainer": "s_grpo"}, "num_generations: the 5 completions of a process"),
    ],
)
def test_batches_that_do_not_fit(sizes, message):
    sizes = {"trainer": "grpo", "dataset": "x", "per_device_train_batch_size": 5, "num_generations": 5} | sizes
    values, _ = parse_values(sizes["trainer"], {"output_dir": "x", "gradient_accumulation_steps": 1} | sizes, [])
    with pytest.raises(ValueError, match=message):
        Batches.of(values, 2, METHODS[sizes["trainer"]][1].whole_groups(values))


def test_obsolete_fields_are_gone_and_their_successors_exist():
    for _, kind in METHODS.values():
        known = {one.name for part in (TrainArguments, ModelConfig, kind) for one in fields(part)}
        assert not known & OBSOLETE_FIELDS.keys()
        for remedy in OBSOLETE_FIELDS.values():
            assert set(re.findall(r"Set (\w+)", remedy)) <= known, remedy
    known = {one.name for part in (DistillArguments, ModelConfig, FineTuningConfig) for one in fields(part)}
    assert known >= {*DISTILL_FIELDS.values()} and not known & {*DISTILL_FIELDS, *OBSOLETE_FIELDS}
    for message in unknown_fields("distill", dict.fromkeys(OBSOLETE_FIELDS), []).values():
        assert set(re.findall(r"Set (\w+)", message)) <= known, message
