"""The layout of a training: the number of processes, and which parts of the model each of them holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType


@dataclass(frozen=True)
class Layout:
    """
    The settings of `accelerate launch` that affect memory.

    Attributes:
        processes (`int`):
            The number of training processes, one per GPU, on all machines together.
        engine (`str`):
            `"ddp"`, `"deepspeed"` or `"fsdp"`.
        stage (`int`):
            What is sharded over the processes, as DeepSpeed counts it: from 1 the optimizer states, from 2 also the
            gradients, and at 3 also the weights. FSDP counts as 3.
        reshard_after_forward (`bool`):
            For FSDP: whether gathered weights are freed between the forward and the backward pass.
        offload_parameters (`bool`), offload_optimizer (`bool`):
            Whether weights and gradients, and the optimizer states, are kept in CPU memory.
        gpu_memory (`int`, *optional*):
            The memory of a GPU in bytes, or `None` if it is not known.
    """

    processes: int = 1
    engine: str = "ddp"
    stage: int = 0
    reshard_after_forward: bool = True
    offload_parameters: bool = False
    offload_optimizer: bool = False
    gpu_memory: int | None = None

    @classmethod
    def of(
        cls, accelerate_config: Path | None = None, num_processes: int | None = None, gpu_memory: float | None = None
    ) -> Layout:
        """
        Return the layout of a launch: of the `--config_file` of `accelerate launch`, or of what launched this process.

        `num_processes` overrides that of the launch, and `gpu_memory`, in GiB, that of the GPU that this process sees.
        """
        for name, value in (("num-processes", num_processes), ("gpu-memory", gpu_memory)):
            if value is not None and value <= 0:
                raise ValueError(f"--{name}: {value} is not positive. Set for example 8 processes of 80 GiB each.")
        processes, sharding = int(os.environ.get("WORLD_SIZE", 1)), _launched(os.environ)
        if accelerate_config is not None:
            if not accelerate_config.is_file():
                raise FileNotFoundError(
                    f"--accelerate-config: there is no file {accelerate_config}. Give one such as "
                    "recipes/accelerate_configs/fsdp2.yaml."
                )
            config = load_config_from_file(str(accelerate_config))
            processes, sharding = config.num_processes, _configured(config)
        memory = None if gpu_memory is None else int(gpu_memory * 2**30)
        if memory is None and torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
        return cls(processes=num_processes or processes, **sharding, gpu_memory=memory)

    def share(self, count: int, stage: int) -> int:
        """Return the bytes on each process of something that is sharded from this `stage` on."""
        return -(-count // self.processes) if self.stage >= stage else count


def _configured(config: Any) -> dict[str, Any]:
    """Read the layout from an accelerate config file."""
    if config.distributed_type == DistributedType.FSDP:
        return _fsdp(config.fsdp_config)
    if config.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed({name.removeprefix("deepspeed_"): value for name, value in config.deepspeed_config.items()})
    return {}


def _launched(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read the layout from the environment of a process that `accelerate launch` has started."""
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return _fsdp({name.lower(): value for name, value in environment.items()})
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        prefix = "ACCELERATE_DEEPSPEED_"
        return _deepspeed({name.removeprefix(prefix).lower(): value for name, value in environment.items()})
    return {}


def _fsdp(options: Mapping[str, Any]) -> dict[str, Any]:
    # In FSDP1, `fsdp_reshard_after_forward` is a sharding strategy.
    reshard = str(options.get("fsdp_reshard_after_forward", True)).lower()
    offloads = str(options.get("fsdp_offload_params", False)).lower() == "true"
    return {
        "engine": "fsdp",
        "stage": 3,
        "reshard_after_forward": reshard not in ("false", "shard_grad_op", "no_shard"),
        "offload_parameters": offloads,
        "offload_optimizer": offloads,
    }


def _deepspeed(options: Mapping[str, Any]) -> dict[str, Any]:
    stage, parameters = options.get("zero_stage", 2), options.get("offload_param_device")
    optimizer = options.get("offload_optimizer_device")
    if (file := options.get("config_file")) is not None:
        zero = json.loads(Path(file).read_text()).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        parameters, optimizer = (zero.get(f"offload_{part}", {}).get("device") for part in ("param", "optimizer"))
    return {
        "engine": "deepspeed",
        "stage": int(stage),
        "offload_parameters": parameters not in (None, "none"),
        "offload_optimizer": optimizer not in (None, "none"),
    }
