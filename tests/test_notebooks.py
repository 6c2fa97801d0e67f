"""The notebooks run from top to bottom; in fewer updates and on fewer problems than they were committed with."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALLER = {"max_steps": 2, "per_device_train_batch_size": 16}
PROBLEMS = 8


def shorten(source: str) -> str:
    for name, most in SMALLER.items():
        source = re.sub(rf'\b({name}(?:=|": ))\d+', rf"\g<1>{most}", source)
    return re.sub(r"select\(range\(\d+\)\)", f"select(range({PROBLEMS}))", source)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells), "committed without its outputs"
    for cell in cells:
        cell.source = shorten(cell.source)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises the error of a cell, with its traceback
