"""Each recipe says what it means to, and trains."""

import json
import re
import shlex
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
from small_runs import DISTILL_RUN, SMALL_RUN, TESTBED_RUN, flags

from step_trl import StepGRPOConfig, StepSelection, testbed
from step_trl.cli import sources
from step_trl.cli.dry_run import checks
from step_trl.cli.dry_run.plan import print_plan
from step_trl.cli.recipe import field_of, load_recipe, parse, read_recipe
from step_trl.cli.train import run_train
from step_trl.trainers import METHODS
from step_trl.trainers.step_grpo_config import VARIANTS


RECIPES = Path(__file__).parent.parent / "recipes"
REAL_MODELS = Path(__file__).with_name("real_models.json")
ALL = sorted({*RECIPES.rglob("*.yaml")} - {*RECIPES.glob("accelerate_configs/*")})
MIXED = [path for path in ALL if "trainer" not in load_recipe(path)]  # of stages of different kinds
ON_TESTBED = [path for path in ALL if path not in MIXED and load_recipe(path)["model_name_or_path"] == "testbed"]
PATHS = [path for path in ALL if path not in MIXED + ON_TESTBED]


def header_of(path):
    """The comment that a recipe begins with."""
    return "".join(f"{line}\n" for line in takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_trains(path, tmp_path):
    fields = load_recipe(path)
    smallest = DISTILL_RUN if fields["trainer"] == "distill" else TESTBED_RUN
    overrides = smallest | {"output_dir": tmp_path / "run"}
    lengths = {"token_targets": [20, 40], "shortest_target": 8}
    overrides |= {name: lengths[name] for name in lengths.keys() & fields.keys()}
    recipe, stages, rest = read_recipe(["--config", str(path), *flags(overrides)])
    for stage in stages:
        meant = recipe | stage
        for found in parse(meant, rest):
            for name in meant.keys() & vars(found).keys() - overrides.keys() - {
                "model_init_kwargs",
                "accelerator_config",
            }:
                value = getattr(found, name)
                assert (list(value) if isinstance(value, tuple) else value) == meant[name], name
    folder = run_train(["--config", str(path), *rest])
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 1
    assert (folder / ("adapter_model.safetensors" if recipe.get("use_peft") else "model.safetensors")).is_file()
    assert f"--config recipes/{path.relative_to(RECIPES)}" in path.read_text()


SMALLEST_TRAINING = {"max_completion_length": 160, "per_device_train_batch_size": 16, "num_generations": 8} | {
    name: TESTBED_RUN[name] for name in ("gradient_accumulation_steps", "steps_per_generation", "use_vllm")
}
SMALLEST_SAMPLING = {"limit": 8, "max_tokens": 200, "engine": "transformers", "per_device_train_batch_size": 4}
SMALLEST_STAGES = {"distill": SMALLEST_SAMPLING | {"n": 2}, "sft": SMALLEST_SAMPLING, "dpo": {}}
SMALLEST_BASE = SMALL_RUN | {
    name: TESTBED_RUN[name] for name in ("model_name_or_path", "dtype", "dataset", "dataset_split")
}
SMALLEST_VISION = SMALLEST_BASE | {"model_name_or_path": "vision-testbed", "dataset": "vision-testbed"}


@pytest.mark.parametrize("path", MIXED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stages_of_different_kinds_train(path, tmp_path):
    header, fields = header_of(path), load_recipe(path)
    assert "\n# Reproduces: " in header and "\n# Departs: " in header
    assert f"train --config recipes/{path.relative_to(RECIPES)}\n" in header
    fields["stages"] = [
        stage | SMALLEST_STAGES.get(stage["trainer"], SMALLEST_TRAINING) | {"max_steps": 1}
        for stage in fields["stages"]
    ]
    smallest = tmp_path / "smallest.yaml"
    base = SMALLEST_VISION if fields["dataset"] == "vision-testbed" else SMALLEST_BASE
    smallest.write_text(json.dumps(fields | base | {"output_dir": str(tmp_path / "run")}))
    folder = run_train(["--config", str(smallest)])
    assert folder.name == f"stage-{len(fields['stages'])}"
    for stage in folder.parent.glob("stage-*"):
        assert json.loads((stage / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize("path", MIXED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stages_of_different_kinds_are_planned(path, real_models, offline, tmp_path, capsys, monkeypatch):
    """The launch of a header that has one, or of the recipe itself."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fields = load_recipe(path)
    model = fields["model_name_or_path"]
    given = ["--config", str(path), "--output_dir", str(tmp_path)]
    for launch in launches(path) or [None]:
        layout = () if launch is None else (Path(launch.accelerate_config), launch.processes)
        source = [] if launch is None else ["--model_name_or_path", str(real_models[model])]
        status = print_plan([*given, *source], *(layout or (None, None)), 80)
        text = " ".join(capsys.readouterr().out.split())
        assert status == 0 and text.endswith("All of this was checked. Nothing was trained."), text
        assert text.count("all known") == text.count("80.0 GiB of a GPU") == len(fields["stages"])


ARMS_ON_TESTBED = {
    "testbed": "grpo-short",
    "spo/testbed": "spo-chain",
    "spo/testbed_tree": "spo-tree",
    "spo/testbed_short_tree": "spo-tree-128",
    "critique_grpo/testbed": "critique-grpo",
    "gvm/testbed": "gvm-grpo",
}


@pytest.mark.parametrize(("name", "arm"), ARMS_ON_TESTBED.items())
def test_a_recipe_on_the_testbed_is_an_arm_of_the_study(name, arm, tmp_path, capsys):
    from study.arms import ARMS
    from study.run import build_trainer

    path = RECIPES / f"{name}.yaml"
    output = ["--output_dir", str(tmp_path / "run")]
    recipe, _, rest = read_recipe(["--config", str(path), *output])
    arguments, model, config = parse(recipe, rest)
    chosen = next(one for one in ARMS if one.name == arm)
    trainer = build_trainer(chosen, 0, str(tmp_path / "run"), config.max_steps)
    own = {"logging_dir", "run_name"}
    assert {k: v for k, v in config.to_dict().items() if k not in own} == {
        k: v for k, v in trainer.args.to_dict().items() if k not in own
    }
    assert (
        METHODS[arguments.trainer][0] is type(trainer) and model.model_name_or_path == arguments.dataset == "testbed"
    )
    header = header_of(path)
    assert "\n# Reproduces: " in header and "\n# Departs: " in header and f"the arm {arm} of" in header
    assert f"#     step-trl train --config recipes/{name}.yaml\n" in header
    assert print_plan(["--config", str(path), *output], None, None, 80) == 0
    assert capsys.readouterr().out.rstrip().endswith("Nothing was trained.")


def test_no_recipe_on_the_testbed_is_forgotten():
    assert ON_TESTBED == sorted(RECIPES / f"{name}.yaml" for name in ARMS_ON_TESTBED)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_header_says_what_is_reproduced_and_what_is_not(path):
    header, fields = header_of(path), load_recipe(path)
    assert "\n# Reproduces: " in header and "\n# Departs: " in header
    batches = fields.get("steps_per_generation", fields["gradient_accumulation_steps"])
    assert f"(4 x {fields['per_device_train_batch_size']} x {batches} = " in header


ABLATIONS = {
    "step_grpo/no_step_reward": {"step_reward": False},
    "step_grpo/no_truncation": {"truncated_rollout": False},
    "step_grpo/mean_of_all": {"step_baseline": "all"},
    "sas/correct_only": {"selection": "correct"},
    "sas/random_steps": {"criterion": "random"},
    "sas/tokens": {"granularity": "token"},
}


@pytest.mark.parametrize("arm", ABLATIONS)
def test_an_ablation_changes_one_field_of_the_paper_s_recipe(arm):
    paper, fields = load_recipe((RECIPES / arm).with_name("paper.yaml")), load_recipe(RECIPES / f"{arm}.yaml")
    changed = {name: value for name, value in fields.items() if name not in paper or paper[name] != value}
    assert changed.pop("output_dir") and changed == ABLATIONS[arm] and paper.keys() <= fields.keys()


def test_both_methods_together_and_lapo_s_first_stage_are_made_of_other_recipes():
    both, step_grpo, sas, lapo_d, lapo = (
        load_recipe(RECIPES / f"{name}.yaml") | {"output_dir": None}
        for name in ("step_grpo/with_sas", "step_grpo/paper", "sas/later_version", "sas/lapo_d", "sas/lapo")
    )
    selection = {name: sas[name] for name in StepSelection.__dataclass_fields__ if name in sas}
    assert both == step_grpo | {"advantage_selection": selection}
    (first, _) = lapo.pop("stages")
    assert lapo_d == lapo | first | {"max_steps": sas["max_steps"]}


STEP_GRPO_MODELS = {
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-1.7B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}


@dataclass
class Launch:
    """A training in a header: its processes, and the arguments after `train`."""

    gpus: list[str]
    accelerate_config: str
    processes: int
    arguments: list[str]


def commands(path):
    """Return the commands in a recipe's header, as words."""
    header = "".join(f"{line[1:]}\n" for line in header_of(path).splitlines())
    lines = header.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if "accelerate launch" in line or "step-trl" in line]


def launches(path):
    found = []
    for words in commands(path):
        if words[1:3] == ["accelerate", "launch"]:
            train = words.index("train")
            config, processes = (words[words.index(flag) + 1] for flag in ("--config_file", "--num_processes"))
            gpus = words[0].removeprefix("CUDA_VISIBLE_DEVICES=").split(",")
            assert words[train - 2 : train] == ["-m", "step_trl"]
            found.append(Launch(gpus, config, int(processes), words[train + 1 :]))
    return found


def launch_lines(path):
    return [launch.arguments for launch in launches(path)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_launch_lines_of_a_header_say_what_they_do(path):
    lines = launch_lines(path)
    assert lines
    for line in lines:
        assert line[:2] == ["--config", f"recipes/{path.relative_to(RECIPES)}"]
        recipe, stages, rest = read_recipe(["--config", str(path), *line[2:]])
        said = {field_of(name): value for name, value in pairwise(rest) if field_of(name) and not field_of(value)}
        for stage in stages:
            meant = recipe | stage | said
            hardware = ["--bf16", "false", "--use_cpu"]  # none of the line's, and none of this machine's
            parts = parse(recipe | stage, [*rest, *hardware])
            values = {name: value for part in parts for name, value in vars(part).items()}
            names = {"model_name_or_path", "output_dir", "trainer", "max_completion_length", "num_generations", "n"}
            for name in names & meant.keys():
                assert values[name] == meant[name], name
            assert all(str(values[name]) == value for name, value in said.items())


def test_each_model_of_step_grpo_has_a_launch_line_in_each_recipe():
    arms = [path for path in (RECIPES / "step_grpo").glob("*.yaml") if "use_peft" not in load_recipe(path)]
    folders = set()
    for path in arms:
        fields = load_recipe(path)
        models = []
        for line in launch_lines(path):
            said = dict(zip(line[2::2], line[3::2], strict=True))
            models.append(said.get("--model_name_or_path", fields["model_name_or_path"]))
            folders.add(said.get("--output_dir", fields["output_dir"]))
        assert sorted(models) == sorted(STEP_GRPO_MODELS), path
    assert len(folders) == 4 * len(arms)  # no run overwrites another's


@pytest.mark.parametrize(("name", "variant"), [("paper", "paper"), ("with_sas", "paper"), ("released", "released")])
def test_the_rollout_of_a_step_grpo_recipe_is_the_one_it_names(name, variant):
    recipe, _, rest = read_recipe(["--config", str(RECIPES / "step_grpo" / f"{name}.yaml"), "--use_cpu"])
    *_, config = parse(recipe, [*rest, "--bf16", "false"])
    assert config.variant == variant
    assert {option: getattr(config, option) for option in VARIANTS[variant]} == VARIANTS[variant]


def test_the_paper_recipes_spell_out_the_defaults(tmp_path):
    for method, defaults in (("step_grpo", StepGRPOConfig(str(tmp_path), bf16=False)), ("sas", StepSelection())):
        recipe = load_recipe(RECIPES / method / "paper.yaml")
        inherited = StepGRPOConfig.__mro__[1].__dataclass_fields__
        for name in recipe.keys() & defaults.__dataclass_fields__.keys() - inherited.keys():
            default = getattr(defaults, name)
            if name == "failed_step_advantage":  # the paper's first version; our default is the later one's
                assert (recipe[name], default) == (1.0, 0.0)
            else:
                assert recipe[name] == (list(default) if isinstance(default, tuple) else default), name


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_header_serves_the_model_with_room_for_a_prompt_on_gpus_that_do_not_train(path):
    (server,) = (words for words in commands(path) if words[1:3] == ["step-trl", "serve"])
    fields, options = load_recipe(path), dict(zip(server[4::2], server[5::2], strict=True))
    assert server[3] == fields["model_name_or_path"]
    budgets = [stage.get("max_completion_length", 0) for stage in fields.get("stages", [])]
    budget = max(fields.get("max_completion_length", 0), fields.get("max_tokens", 0), *budgets)
    context = json.loads(REAL_MODELS.read_text())[server[3]]["max_position_embeddings"]
    assert int(options["--max-model-len"]) >= min(budget + 2048, context)
    serving = server[0].removeprefix("CUDA_VISIBLE_DEVICES=").split(",")
    parallel = options.get("--tensor-parallel-size", options.get("--data-parallel-size"))
    assert len(serving) == int(parallel)
    for launch in launches(path):
        assert len({*launch.gpus, *serving}) == len(launch.gpus) + len(serving) == 8
        assert len(launch.gpus) == launch.processes


@pytest.fixture(scope="module")
def real_models(tmp_path_factory):
    """Folders with the published configurations of the recipes' models, and the testbed's tokenizer."""
    folders = {}
    for name, config in json.loads(REAL_MODELS.read_text()).items():
        folders[name] = tmp_path_factory.mktemp("models") / name.split("/")[1]
        testbed.load_tokenizer().save_pretrained(folders[name])
        (folders[name] / "config.json").write_text(json.dumps(config))
    return folders


@cache
def many_rows():
    return testbed.load_dataset("train").select(range(1200))


@pytest.fixture
def offline(monkeypatch):
    """Replace a recipe's problems by the testbed's, which are read once. No server runs."""

    async def answer(*args, **kwargs):
        pass

    monkeypatch.setattr(sources, "load_problems", lambda *arguments, **options: many_rows())
    monkeypatch.setattr(checks.VLLMServerEngine, "check", answer)


@pytest.mark.xdist_group("sizes")  # which are remembered
@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_launch_of_a_header_fits_80_gib(path, real_models, offline, tmp_path, capsys, monkeypatch):
    """`step-trl train --dry-run` of the launch, from one process."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fields = load_recipe(path)
    for launch in launches(path):
        said = dict(zip(launch.arguments[::2], launch.arguments[1::2], strict=True))
        model = said.get("--model_name_or_path", fields["model_name_or_path"])
        given = [*launch.arguments, "--model_name_or_path", str(real_models[model]), "--output_dir", str(tmp_path)]
        status = print_plan(given, Path(launch.accelerate_config), launch.processes, 80)
        text = " ".join(capsys.readouterr().out.split())
        assert status == 0 and text.endswith("All of this was checked. Nothing was trained."), text
        shares = [int(share) for share in re.findall(r"That is (\d+)% of 80.0 GiB of a GPU", text)]
        assert shares and max(shares) <= 90
        if fields["trainer"] != "distill":
            completions = 4 * fields["per_device_train_batch_size"] * fields["steps_per_generation"]
            count = fields["steps_per_generation"] // fields["gradient_accumulation_steps"]
            assert f"{completions:,} completions are generated at once" in text
            assert f"by 4 processes, and learned from in {count} update" in text


def test_rollouts_in_process_of_an_8b_model_are_refused(real_models, offline, tmp_path, capsys):
    """The layout that the paper's recipe once had: on 8 processes without servers, micro-batches of 5."""
    old = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 16, "steps_per_generation": 64}
    old |= {"use_vllm": False, "model_name_or_path": real_models["Qwen/Qwen3-8B"], "output_dir": tmp_path}
    given = ["--config", str(RECIPES / "step_grpo" / "paper.yaml"), *flags(old)]
    assert print_plan(given, num_processes=8, gpu_memory=80) == 1
    wrong = " ".join(capsys.readouterr().out.split("Wrong:")[1].split())
    assert re.match(r"memory: about [78]\d\d\.\d GiB per process for 8,190,735,360 parameters", wrong)
    assert "KV cache 721." in wrong and "It does not fit 80.0 GiB of a GPU" in wrong
    assert "Each of these lowers it: use_vllm=true with a server (saves 67" in wrong


def test_the_papers_recipes_have_the_plain_kl_term():
    for path in (path for method in ("step_grpo", "sas") for path in (RECIPES / method).glob("*.yaml")):
        fields = load_recipe(path)
        assert fields["trainer"] == "distill" or fields["use_bias_correction_kl"] is False, path


def test_the_baselines_of_sas_are_trained_on_its_reward():
    for path in (RECIPES / "sas").glob("*.yaml"):
        fields = load_recipe(path)
        assert fields["trainer"] == "sas" or fields["require_end_of_thinking"] is True, path
