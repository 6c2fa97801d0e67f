"""Recipes that take fields from another file by `base`."""

import pytest
import yaml
from small_runs import TESTBED_RUN, flags

from step_trl.cli.main import main
from step_trl.cli.recipe import load_recipe, parse, read_recipe, recipe_layers
from step_trl.cli.train import run_train


PAPER = {
    "trainer": "step_grpo",
    "dataset": "testbed",
    "confidence_threshold": 0.9,
    "beta": 0.1,
    "output_dir": "runs/a",
}


@pytest.fixture
def recipe(tmp_path):
    """`recipe(name, **fields)` writes one and returns its path."""

    def recipe(name, **fields):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(fields))
        return path

    return recipe


def test_the_nearest_file_wins_and_paths_are_relative_to_the_file_that_has_them(recipe):
    paper = recipe("papers/paper.yaml", **PAPER)
    middle = recipe("papers/middle.yaml", base="paper.yaml", beta=0.2, epsilon=0.3)
    own = recipe("own/own.yaml", base="../papers/middle.yaml", output_dir="runs/b", epsilon=0.1)
    assert load_recipe(own) == PAPER | {"beta": 0.2, "epsilon": 0.1, "output_dir": "runs/b"}
    layers = [(path.resolve(), fields) for path, fields in recipe_layers(own)]
    assert layers == [
        (own, {"output_dir": "runs/b", "epsilon": 0.1}),
        (middle, {"beta": 0.2}),
        (paper, {name: PAPER[name] for name in ("trainer", "dataset", "confidence_threshold")}),
    ]
    assert load_recipe(paper) == PAPER


def test_another_trainer_leaves_the_options_that_it_does_not_have(recipe):
    recipe("paper.yaml", **PAPER, no_such_field=1)
    baseline = recipe("baseline.yaml", base="paper.yaml", trainer="grpo")
    left = {name: PAPER[name] for name in PAPER.keys() - {"confidence_threshold"}}
    assert load_recipe(baseline) == left | {"trainer": "grpo", "no_such_field": 1}  # which is an error, as before
    with pytest.raises(ValueError, match=r"confidence_threshold: not an option of trainer 'grpo'"):
        fields = load_recipe(recipe("wrong.yaml", base="paper.yaml", trainer="grpo", confidence_threshold=0.5))
        parse({name: value for name, value in fields.items() if name != "no_such_field"}, [])
    recipe("examples.yaml", trainer="sft", dataset="testbed", reverse_thinking=True, max_length=64)
    pairs = load_recipe(recipe("pairs.yaml", base="examples.yaml", trainer="dpo"))
    assert pairs == {"trainer": "dpo", "dataset": "testbed", "max_length": 64}


def test_stages_are_inherited_as_a_whole(recipe):
    stages = [{"beta": 0.0}, {"beta": 0.5}]
    recipe("paper.yaml", **PAPER, stages=stages)
    heir = recipe("heir.yaml", base="paper.yaml", output_dir="runs/b")
    assert read_recipe(["--config", str(heir), "--seed", "1"]) == (
        PAPER | {"output_dir": "runs/b"},
        stages,
        ["--seed", "1"],
    )
    other = recipe("other.yaml", base="paper.yaml", stages=[{"beta": 0.7}])
    assert read_recipe([f"--config={other}"]) == (PAPER, [{"beta": 0.7}], [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": {"base": "a.yaml"}}, r"base: \S*a\.yaml -> \S*a\.yaml is a circle\. Drop `base` from one of them"),
        ({"a": {"base": "b.yaml"}, "b": {"base": "../dir/a.yaml"}}, r"base: .*a\.yaml -> .*b\.yaml -> .*is a circle"),
        (
            {"a": {"base": "nowhere.yaml"}},
            r"base: \S*a\.yaml names \S*nowhere\.yaml, which does not exist\. Give a path",
        ),
        (
            {"a": {"base": ["b.yaml", "c.yaml"]}},
            r"base: \['b\.yaml', 'c\.yaml'\] of \S*a\.yaml is not a path\. Give one",
        ),
    ],
)
def test_what_is_wrong_with_a_base_is_said_in_one_line(fields, message, recipe, capsys):
    for name, values in fields.items():
        recipe(f"dir/{name}.yaml", **values)
    path = recipe("dir/a.yaml", **fields["a"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_recipe(path)
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--dry-run", "--config", str(path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("base: ")


def test_a_run_and_its_plan_use_what_the_base_says(recipe, tmp_path, capsys):
    small = {name: value for name, value in TESTBED_RUN.items() if name not in ("num_generations", "max_steps")}
    recipe("paper.yaml", **PAPER | {"max_steps": 2, "num_generations": 10})
    own = recipe("own.yaml", base="paper.yaml", max_steps=1)
    given = ["--config", str(own), *flags(small | {"output_dir": tmp_path / "run"})]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--dry-run", *given])
    plan = " ".join(capsys.readouterr().out.split())
    assert f"recipe {own} sets max_steps base {tmp_path / 'paper.yaml'} sets beta, confidence_threshold" in plan
    assert "(prompts: 1, of each: 10)" in plan and "1 of 10 completions each" in plan
    assert "confident than 0.9 reward" in plan.replace(",", "")
    folder = run_train(given)
    assert (folder / "model.safetensors").is_file()
