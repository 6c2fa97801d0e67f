"""
Every command of `benchmarks/README.md` starts, and comes to its end.

Each script says in its constant `SMALLEST` with which options; they follow those of the command, and win. A script is
run in this process, and the processes that it starts are forks of one that has imported what it needs, since imports
take longer than a script. `make demo`, `step-trl eval` and the study have tests of their own.
"""

import importlib
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMAND = re.compile(r"`python benchmarks/((?:gpu/)?\w+)(?:\.py)?( [^`]*)?`")
# It leaves a process with vLLM's groups in it, where nothing else can be trained.
OWN_PROCESS = ("colocated",)


def commands():
    """`(module, arguments)` of each command, once."""
    found = COMMAND.findall((BENCHMARKS / "README.md").read_text())
    return sorted({(module, tuple(shlex.split(arguments))) for module, arguments in found if module != "study"})


def scripts():
    blocks = {f"gpu/{path.stem}" for path in BENCHMARKS.glob("gpu/*.py") if "\nSMALLEST" in path.read_text()}
    return (
        {path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
        | {"testbed_model", "gpu", "smollm2"}
        | blocks - {"gpu/__main__"}
    )


def test_every_script_is_in_the_page():
    assert scripts() == {module for module, _ in commands()}


def takes_a_server(module):
    return '"--url"' in file_of(module).read_text()


def file_of(module):
    script = BENCHMARKS / f"{module}.py"
    return script if script.exists() else BENCHMARKS / module / "__main__.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, preloaded_executable):
    """Run a command with further arguments. Returns what it printed."""

    def run(module, arguments, *further):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "executable", preloaded_executable)
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: get_context("forkserver"))
        threads = torch.get_num_threads()
        with imported(module) as script:
            command = [*arguments, *script.SMALLEST, *further]
            if module in OWN_PROCESS:
                return in_a_process(script.__file__, command)
            monkeypatch.setattr(sys, "argv", [module, *command])
            try:
                script.main()
            finally:
                torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


@contextmanager
def imported(module):
    """Import a script under its plain name, by which its processes find it. `tests/rollout` has such a name, too."""
    name = (module if (BENCHMARKS / f"{module}.py").exists() else f"{module}.__main__").replace("/", ".")
    if "." in name:
        yield importlib.import_module(name)
        return
    before = sys.modules.pop(name, None)
    try:
        yield importlib.import_module(name)
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def in_a_process(file, arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, file, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout


def commands_that(condition):
    chosen = [command for command in commands() if condition(command[0])]
    return pytest.mark.parametrize(("module", "arguments"), chosen, ids=[name for name, _ in chosen])


@commands_that(lambda module: not takes_a_server(module))
def test_a_command_runs(module, arguments, run):
    assert re.search(r"\d", run(module, arguments))


@commands_that(takes_a_server)
@pytest.mark.timeout(300)
def test_a_command_runs_on_a_server(module, arguments, run, vllm_server):
    assert re.search(r"\d", run(module, arguments, "--url", vllm_server.url))
