"""The package is as `CONTRIBUTING.md` draws it: imports run one way, classes are shallow, and functions short."""

from __future__ import annotations

import ast
import graphlib
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest

import step_trl
from step_trl.trainers import METHODS


PACKAGE = Path(step_trl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import from rooms of lower rows, and from its own.
LAYERS = (
    {"cli"},
    {"evaluation", "report", "trainers", "endpoint"},
    {"monitor", "runtime"},
    {"preferences"},
    {"rollout", "rewards", "advantages", "losses"},
    {"steps", "text", "data", "token_targets", "testbed", "thoughts"},
    {"checks", "files", "retry", "_compat", "_version"},
)
LONGEST = 50  # lines of code of a function


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a module imports anywhere, under `TYPE_CHECKING` and in functions too."""
    names = {module_name(file) for file in FILES}
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            source = f"{base}.{node.module}" if node.module else base
            found |= {one if (one := f"{source}.{alias.name}") in names else source for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
    return found - {module_name(path)}


def test_no_module_imports_itself_in_a_circle():
    graph = {module_name(path): imports_of(path) for path in FILES}
    graph.pop("step_trl")  # its names are looked up in the trainers when they are asked for
    assert sum(map(len, graph.values())) > 100
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_imports_run_one_way():
    rows = {room: row for row, rooms in enumerate(LAYERS) for room in rooms}
    for path in FILES:
        room = module_name(path).split(".")[1:2]
        if room in ([], ["__main__"]):
            continue
        upwards = [name for name in imports_of(path) if "." in name and rows[name.split(".")[1]] < rows[room[0]]]
        assert not upwards, f"{module_name(path)} imports {upwards}"


@pytest.mark.parametrize("name", METHODS)
def test_a_trainer_is_at_most_three_of_our_classes_deep(name):
    for made in METHODS[name]:
        ours = [parent for parent in made.__mro__ if parent.__module__.startswith("step_trl.trainers")]
        assert len(ours) <= (3 if made is METHODS[name][0] else 4)


def lines_with_code(source: str) -> set[int]:
    """Numbers of the lines that hold more than a comment."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {line for token in tokens if token.type not in skipped for line in range(token.start[0], token.end[0] + 1)}


def test_functions_are_short():
    for path in FILES:
        code = lines_with_code(path.read_text())
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                is_documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = range(first.lineno, (first.end_lineno or 0) + 1) if is_documented else range(0)
                lines = {*range(node.lineno, (node.end_lineno or 0) + 1)} & code - {*docstring}
                assert len(lines) <= LONGEST, f"{module_name(path)}.{node.name}: {len(lines)} lines"
