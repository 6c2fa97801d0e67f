"""Each recipe says what it means to, and trains."""

import json
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml
from small_runs import TESTBED_RUN, flags

from step_trl import StepGRPOConfig, StepSelection
from step_trl.recipe import parse, read_recipe
from step_trl.rollout import ConfidenceTruncation
from step_trl.train import run_train


RECIPES = Path(__file__).parent.parent / "recipes"
PATHS = sorted({*RECIPES.rglob("*.yaml")} - {*RECIPES.glob("accelerate_configs/*")})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_trains(path, tmp_path):
    fields = yaml.safe_load(path.read_text())
    overrides = TESTBED_RUN | {"output_dir": tmp_path / "run"}
    if "token_targets" in fields:
        overrides["token_targets"] = [20, 40]
    recipe, stages, rest = read_recipe(["--config", str(path), *flags(overrides)])
    for stage in stages:
        meant = recipe | stage
        for found in parse(meant, rest):
            for name in meant.keys() & vars(found).keys() - overrides.keys() - {"model_init_kwargs"}:
                value = getattr(found, name)
                assert (list(value) if isinstance(value, tuple) else value) == meant[name], name
    folder = run_train(["--config", str(path), *rest])
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 1
    assert (folder / ("adapter_model.safetensors" if recipe.get("use_peft") else "model.safetensors")).is_file()
    assert f"--config recipes/{path.relative_to(RECIPES)}" in path.read_text()


def test_the_released_step_grpo_recipe_is_the_released_variant():
    fields = yaml.safe_load((RECIPES / "step_grpo" / "released.yaml").read_text())
    released = {name: list(v) if isinstance(v, tuple) else v for name, v in ConfidenceTruncation.released().items()}
    assert released.items() <= fields.items()


def test_the_paper_recipes_spell_out_the_defaults():
    for method, defaults in (("step_grpo", StepGRPOConfig), ("sas", StepSelection)):
        fields = yaml.safe_load((RECIPES / method / "paper.yaml").read_text())
        ours = defaults.__dataclass_fields__
        inherited = StepGRPOConfig.__mro__[1].__dataclass_fields__
        for name in fields.keys() & ours.keys() - inherited.keys():
            made = ours[name].default_factory
            assert fields[name] == (ours[name].default if made is MISSING else made()), name
