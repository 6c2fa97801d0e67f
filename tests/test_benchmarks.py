"""
Every command of `benchmarks/README.md` starts, and comes to its end.

Each script says in its constant `SMALLEST` with which options; they follow those of the command, and win. A script is
run in this process, since the imports of a new one take longer than it. `make demo`, `step-trl eval` and `step-trl
study` have tests of their own.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMAND = re.compile(r"`python (benchmarks/\w+\.py|-m step_trl\.[\w.]+)( [^`]*)?`")
# It leaves a process with vLLM's groups in it, where nothing else can be trained.
OWN_PROCESS = ("colocated",)


def commands():
    """`(module, arguments)` of each command, once."""
    found = COMMAND.findall((BENCHMARKS / "README.md").read_text())
    modules = [
        (script.removeprefix("benchmarks/").removesuffix(".py").removeprefix("-m "), *rest) for script, *rest in found
    ]
    return sorted({(module, tuple(shlex.split(arguments))) for module, arguments in modules})


def scripts():
    return {path.stem for path in BENCHMARKS.glob("*.py")}


def test_every_script_is_in_the_page():
    assert scripts() == {module for module, _ in commands() if not module.startswith("step_trl.")}
    assert len(commands()) >= 12


@pytest.mark.parametrize(
    ("module", "arguments"), commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_runs(module, arguments, tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module(module)
    command = [module, *arguments, *script.SMALLEST]
    threads = torch.get_num_threads()
    if '"--url"' in Path(script.__file__).read_text():
        command += ["--url", request.getfixturevalue("vllm_server").url]
    if module in OWN_PROCESS:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        run = [sys.executable, script.__file__, *command[1:]]
        told = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout
    else:
        monkeypatch.setattr(sys, "argv", command)
        try:
            script.main()
        finally:
            torch.set_num_threads(threads)
            if module in scripts():  # their names are too plain to stay
                del sys.modules[module]
        told = capsys.readouterr().out
    assert re.search(r"\d", told)
