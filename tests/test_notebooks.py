"""The notebooks run from top to bottom; in fewer updates and on fewer problems than they were committed with."""

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from preloaded import PreloadedPython


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALLER = {
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "max_completion_length": 160,
    "LENGTH": 128,
    "max_tokens": 96,
    "n": 1,
}
PROBLEMS = 8
# The real model takes seconds for what the testbed's takes milliseconds.
SMALLEST = SMALLER | {"per_device_train_batch_size": 4}


def shorten(source: str, is_real: bool = False) -> str:
    """A cell with fewer updates, problems and tokens."""
    most = SMALLEST if is_real else SMALLER
    source = re.sub(
        rf'\b({"|".join(most)})( ?= ?|": )(\d+)',
        lambda found: f"{found[1]}{found[2]}{min(most[found[1]], int(found[3]))}",
        source,
    )
    if is_real:
        source = re.sub(r"(MAX_TOKENS = .* else) \d+", r"\1 12", source)
    source = re.sub(r"select\(range\(\d+\)\)", f"select(range({PROBLEMS}))", source)
    return source.replace('load_dataset("train")', 'load_dataset("train").select(range(64))')


@pytest.fixture
def preloaded_kernel(path, monkeypatch, tmp_path, preloaded_executable):
    """A kernel that need not import torch; but for one notebook, which shows that the imports work in a kernel."""

    def launch_kernel(command, *, env, cwd, **_):
        return PreloadedPython(command[1:], tmp_path / "kernel.log", env, cwd, preloaded_executable)

    if path.stem != "quickstart":
        monkeypatch.setattr(local_provisioner, "launch_kernel", launch_kernel)


def with_group(path):
    """The notebook with the real model runs in the worker that has read it."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.xdist_group("smollm2")] * (path.stem == "your_model"))


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("preloaded_kernel")
@pytest.mark.parametrize("path", map(with_group, NOTEBOOKS))
def test_notebook_runs(path, tmp_path, request):
    if path.stem == "your_model":
        folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
        folder.parent.mkdir()
        folder.symlink_to(request.getfixturevalue("smollm2"))
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells), "committed without its outputs"
    for cell in cells:
        cell.source = shorten(cell.source, is_real=path.stem == "your_model")
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises the error of a cell, with its traceback
    assert not [text for text in messages(cells) if "warn" in text.lower()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_clean(path):
    """No warnings, and nothing about the machine that they were made on."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert messages(cells) == []
    assert not re.search(r"(?<![\w./])/(home|root|tmp|work|usr)/", "".join(str(cell.outputs) for cell in cells))


def messages(cells: list[nbformat.NotebookNode]) -> list[str]:
    """What cells wrote to the standard error."""
    streams = [output for cell in cells for output in cell.outputs if output.output_type == "stream"]
    return [output.text for output in streams if output.name == "stderr"]
