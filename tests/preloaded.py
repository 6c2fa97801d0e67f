"""
Python processes that do not import torch, TRL and vLLM again, which takes ten seconds of a core. They are forked from
a process that has imported them and done nothing else; `multiprocessing` starts it when the first one is asked for.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

import forked_python
import transformers.utils


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "ipykernel.kernelapp",
        "step_trl.evaluation",
        "step_trl.report",
        "step_trl.testbed",
        "step_trl.trainers",
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
    ]
)


class PreloadedPython:
    """
    What `subprocess.Popen([sys.executable, *arguments])` is, in a session of its own.

    Args:
        arguments (`Sequence[str]`):
            `["script.py", ...]`, `["-m", "module", ...]` or `["-c", "code", ...]`.
        output (`str` or `Path`):
            File or terminal that what it prints is added to.
        env (`Mapping[str, str]`, *optional*):
            Its environment, by default ours.
        cwd (`str` or `Path`, *optional*):
            Its working directory, by default ours.
        executable (`str`, *optional*):
            Its `sys.executable`.
    """

    stdin = stdout = stderr = None  # `jupyter_client` would close them

    def __init__(
        self,
        arguments: Sequence[str],
        output: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        executable: str = sys.executable,
    ):
        self.args = [sys.executable, *arguments]
        environment = dict(os.environ if env is None else env)
        begun, begin = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(
            target=_run, args=(begin, list(arguments), str(output), environment, cwd, executable)
        )
        self._process.start()
        begin.close()
        begun.poll(None)  # a signal to its group would reach ours before it has a session
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_preloaded(arguments: Sequence[str], output: Path, timeout: float = 300, **options) -> tuple[int, str]:
    """Exit status and output of a [`PreloadedPython`]."""
    process = PreloadedPython(arguments, output, **options)
    try:
        return process.wait(timeout), output.read_text(errors="replace")
    finally:
        process.kill()


@contextmanager
def preloaded_executable() -> Iterator[str]:
    """
    An executable in place of `sys.executable`, for code that starts processes itself. They are forks, and so are the
    ones that these start with their `sys.executable`.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address, executable = f"{folder}/socket", Path(folder) / "python"
        command = [sys.executable, "-I", "-S", forked_python.__file__, address, str(executable)]
        executable.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        executable.chmod(0o755)
        listener.bind(address)
        listener.listen()

        def accept() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=_fork_for, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield str(executable)


def _fork_for(connection: socket.socket) -> None:
    """Fork a process for `forked_python.py`, which is at the other end of the connection."""
    with connection, connection.makefile() as lines:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        asked = json.loads(lines.readline())
        begun, begin = _FORKS.Pipe(duplex=False)
        inherited = [Connection(stream) for stream in streams]
        process = _FORKS.Process(
            target=_run,
            args=(begin, asked["arguments"], inherited, asked["environment"], asked["cwd"], asked["executable"]),
        )
        process.start()
        for one in (begin, *inherited):
            one.close()
        begun.poll(None)
        connection.sendall(f"{process.pid}\n".encode())
        if process.sentinel not in wait([process.sentinel, connection]):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        with suppress(OSError):
            connection.sendall(f"{process.exitcode}\n".encode())


def _fork_engines() -> None:
    """On CPUs, vLLM spawns its engine's process, to give it a faster `malloc`. On GPUs, it forks it."""
    from vllm.v1.engine import utils

    utils.get_mp_context = partial(multiprocessing.get_context, "fork")


def _leave_out_system_information() -> None:
    """Engines ask a server for its configuration. It would add the machine's, which takes it three seconds."""
    from vllm.entrypoints.serve.dev.server_info import api_router

    api_router._get_system_env_info_cached = dict


def _direct(output: str | list[Connection]) -> None:
    """Give the process a file or terminal, or three standard streams."""
    if isinstance(output, list):
        for stream, inherited in enumerate(output):
            os.dup2(inherited.fileno(), stream)
        return
    file = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND)  # a terminal becomes that of the session
    for stream in (0, 1, 2) if os.isatty(file) else (1, 2):
        os.dup2(file, stream)


def _run(
    begin: Connection,
    arguments: list[str],
    output: str | list[Connection],
    environment: dict[str, str],
    cwd: str | None,
    executable: str,
) -> None:
    """Run in the forked process."""
    gc.freeze()  # what is imported is never garbage, and takes long to look through
    os.setsid()
    begin.close()
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    _direct(output)
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(line_buffering=True)
    sys.executable = executable
    kind, *rest = arguments
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [path for path in [*paths, *sys.path] if path]
    _fork_engines()
    _leave_out_system_information()
    transformers.utils.is_in_notebook.cache_clear()
    if "wandb" in sys.modules:
        from wandb.sdk.data_types._private import MEDIA_TMP

        MEDIA_TMP.__init__("wandb-media")  # each process removes its temporary folder when it ends
    try:
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # `multiprocessing` leaves them out
