"""`StepGRPOConfig.variant` sets the options in which the paper and its released code differ; given ones win."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import yaml
from trl import TrlParser

from step_trl import StepGRPOConfig
from step_trl.rollout import ConfidenceTruncation


RELEASED = ConfidenceTruncation.released()
PAPER = {
    "triggers": ("Wait", "Alternatively"),
    "answer_prompt": "\n</think>\n\nThe final answer is",
    "max_probes": None,
    "keep_trigger": True,
    "keep_probe_answer": True,
    "require_probe_end": False,
    "skip_probe_tokens": 0,
    "exit_margin": 0,
}
OTHERS = {"paper": RELEASED, "released": PAPER | {"max_probes": 3}}


@pytest.fixture
def config(tmp_path):
    return lambda **options: StepGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def options_of(config) -> dict:
    return {name: getattr(config, name) for name in PAPER}


def test_a_variant_sets_all_the_options_in_which_they_differ(config, tmp_path):
    assert options_of(config()) == options_of(config(variant="paper")) == PAPER
    assert options_of(config(variant="released")) == RELEASED
    assert all(RELEASED[name] != value for name, value in PAPER.items())


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("variant", OTHERS)
def test_an_option_that_is_given_wins(config, variant, name):
    given = OTHERS[variant][name]
    by_variant = options_of(config(variant=variant))
    assert options_of(config(variant=variant, **{name: given})) == by_variant | {name: given}
    assert by_variant[name] != given


@pytest.mark.parametrize("variant", OTHERS)
def test_values_survive_copies(config, variant):
    original = config(variant=variant, exit_margin=7)
    read = {field.name: getattr(original, field.name) for field in dataclasses.fields(original) if field.init}
    read["generation_batch_size"] = None  # TRL takes this or steps_per_generation, and fills in both
    copies = [
        pickle.loads(pickle.dumps(original)),
        dataclasses.replace(original, output_dir="elsewhere", generation_batch_size=None),
        StepGRPOConfig(**read),
    ]
    for copy in copies:
        assert options_of(copy) == options_of(original)
        assert copy.variant == variant and copy.exit_margin == 7
    written = original.to_dict()
    assert {name: written[name] for name in PAPER} == options_of(original)


def test_recipe_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "bf16": False, "variant": "released"}))
    (config,) = TrlParser(StepGRPOConfig).parse_args_and_config(
        ["--config", str(recipe), "--keep_trigger", "true", "--triggers", "Wait", "Hmm", "--skip_probe_tokens", "0"]
    )
    assert options_of(config) == RELEASED | {
        "keep_trigger": True,
        "triggers": ("Wait", "Hmm"),
        "skip_probe_tokens": 0,
    }
    assert "--variant" in TrlParser(StepGRPOConfig).format_help()


def test_an_unknown_variant_is_named(config):
    with pytest.raises(ValueError, match="variant: 'code' is not known"):
        config(variant="code")
