"""Each recipe is a valid configuration, and says what it means to."""

from pathlib import Path

import pytest
import yaml

from step_trl import SASConfig, StepGRPOConfig, StepSelection
from step_trl.rollout import ConfidenceTruncation


RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGS = {"step_grpo": StepGRPOConfig, "sas": SASConfig}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_is_valid(path, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    fields = yaml.safe_load(path.read_text()) | {"bf16": False, "use_cpu": True}
    config = CONFIGS[path.parent.name](str(tmp_path), **fields)
    for name, value in fields.items():
        found = getattr(config, name)
        assert (list(found) if isinstance(found, tuple) else found) == value


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
            value = ours[name].default
            assert fields[name] == (list(value) if isinstance(value, tuple) else value), name
