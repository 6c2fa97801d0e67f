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

    Args:
        processes (`int`, *optional*, defaults to `1`):
            The number of training processes, one per GPU, on all machines together.
        engine (`str`, *optional*, defaults to `"ddp"`):
            `"ddp"`, `"deepspeed"` or `"fsdp"`.
        stage (`int`, *optional*, defaults to `0`):
            What is sharded over the processes, as DeepSpeed counts it: from 1 the optimizer states, from 2 also the
            gradients, and at 3 also the weights. FSDP counts as 3.
        reshard_after_forward (`bool`, *optional*, defaults to `True`):
            For FSDP: whether gathered weights are freed between the forward and the backward pass.
        offload_parameters (`bool`, *optional*, defaults to `False`):
            Whether weights and gradients are kept in CPU memory.
        offload_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the optimizer states are kept in CPU memory.
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
        Return the layout of a launch.

        Args:
            accelerate_config (`Path`, *optional*):
                The `--config_file` of `accelerate launch`. By default, the settings that launched this process.
            num_processes (`int`, *optional*):
                The number of processes. By default, that of the file or of this launch.
            gpu_memory (`float`, *optional*):
                The memory of a GPU in GiB. By default, that of the GPU that this process sees.
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
        return cls(
            processes=num_processes or processes,
            **sharding,
            gpu_memory=_visible_memory() if gpu_memory is None else int(gpu_memory * 2**30),
        )

    @property
    def name(self) -> str:
        """Return the name that users know it by."""
        if self.engine == "ddp":
            return "DDP" if self.processes > 1 else "one GPU"
        return "FSDP" if self.engine == "fsdp" else f"ZeRO-{self.stage}"

    def share(self, count: int, stage: int) -> int:
        """Return the bytes on each process of something that is sharded from this `stage` on."""
        return -(-count // self.processes) if self.stage >= stage else count


def _configured(config: Any) -> dict[str, Any]:
    """Read the layout from an accelerate config file."""
    if config.distributed_type == DistributedType.FSDP:
        options = config.fsdp_config
        return _fsdp(options.get("fsdp_reshard_after_forward", True), options.get("fsdp_offload_params", False))
    if config.distributed_type == DistributedType.DEEPSPEED:
        options = config.deepspeed_config
        return _deepspeed(
            options.get("deepspeed_config_file"),
            options.get("zero_stage", 2),
            options.get("offload_param_device"),
            options.get("offload_optimizer_device"),
        )
    return {}


def _launched(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read the layout from the environment variables that `accelerate launch` sets for its processes."""
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return _fsdp(
            environment.get("FSDP_RESHARD_AFTER_FORWARD", True), environment.get("FSDP_OFFLOAD_PARAMS", False)
        )
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return _deepspeed(
            environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"),
            environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2),
            environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
            environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        )
    return {}


def _fsdp(reshard: Any, offload: Any) -> dict[str, Any]:
    # In FSDP1, this is a sharding strategy.
    reshards = str(reshard).lower() not in ("false", "shard_grad_op", "no_shard")
    offloads = str(offload).lower() == "true"
    return {
        "engine": "fsdp",
        "stage": 3,
        "reshard_after_forward": reshards,
        "offload_parameters": offloads,
        "offload_optimizer": offloads,
    }


def _deepspeed(file: str | None, stage: Any, parameters: str | None, optimizer: str | None) -> dict[str, Any]:
    if file is not None:
        zero = json.loads(Path(file).read_text()).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        parameters = zero.get("offload_param", {}).get("device")
        optimizer = zero.get("offload_optimizer", {}).get("device")
    return {
        "engine": "deepspeed",
        "stage": int(stage),
        "offload_parameters": parameters not in (None, "none"),
        "offload_optimizer": optimizer not in (None, "none"),
    }


def _visible_memory() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
