"""
What the processes of a distributed training have to do together: fail, and hold the parameters of a sharded model.

Only our own rollouts need whole parameters, since each process samples at its own pace: transformers' `generate` keeps
the processes in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl import GRPOTrainer

from ..rollout.engines import EngineUnavailableError


def rollout_seeds(key: Sequence[int], first: int, count: int) -> list[int]:
    """
    Return the seeds, below 2**62, of `count` completions of a batch, starting at index `first`.

    `key` are non-negative numbers that identify the batch over all processes, such as the run's seed and the update.
    """
    return np.random.default_rng(list(key)).integers(2**62, size=first + count)[first:].tolist()


@contextmanager
def failing_together() -> Iterator[None]:
    """
    Raise an error in every process if the block raises one in any process. Every process must enter.

    If one process failed alone, the others would deadlock in their next collective operation. The failed process keeps
    its own error and traceback; the errors of the others name it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    unavailable = isinstance(failure, EngineUnavailableError)
    reports = gather_object([None if failure is None else (unavailable, f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            server_is_away, message = report
            raise (EngineUnavailableError if server_is_away else RuntimeError)(f"Process {rank} failed. {message}")


@contextmanager
def whole_parameters(trainer: GRPOTrainer) -> Iterator[None]:
    """
    Gather all parameters of a trainer's policy on every process if FSDP2 shards it. Every process must enter.

    FSDP2 gathers a layer's parameters in each of its forward passes, which is a collective operation, and processes
    run different numbers of them. This is what TRL does under ZeRO-3 (`ds3_gather_for_generation`).
    """
    if trainer._dist.fsdp_version != 2:
        yield
        return
    model = cast("PreTrainedModel", trainer.model_wrapped)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        reshard = trainer.accelerator.state.fsdp_plugin.reshard_after_forward
        # accelerate keeps the parameters that the forward pass used last: the backward pass begins with them.
        for unit in units:
            unit.set_reshard_after_forward(reshard, recurse=False)
            unit.reshard()
        for last in (model, model.get_output_embeddings()):
            if isinstance(last, FSDPModule):
                last.set_reshard_after_forward(False, recurse=False)


def check_reference_model(plugin: FullyShardedDataParallelPlugin) -> None:
    """
    Refuse a reference model that FSDP2 would leave without weights.

    With this option, only the first process reads weights. accelerate sends the policy's to the others, but it is TRL
    that shards the reference model.
    """
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: the reference model of beta would only have weights on the first "
            "process. Set it to false in the accelerate config, or beta=0.0."
        )


def check_rollouts_in_process(zero_stage: int, fsdp_version: int | None, gather_for_generation: bool) -> None:
    """
    Refuse settings that would deadlock because processes run different numbers of forward passes of a sharded model.

    `zero_stage` is 0 without DeepSpeed, `fsdp_version` `None` without FSDP, and `gather_for_generation` TRL's
    `ds3_gather_for_generation`.
    """
    if zero_stage == 3 and not gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation: without it, the processes of ZeRO-3 would have to sample in step, which "
            "truncated rollouts do not. Set ds3_gather_for_generation=True, use_vllm=True or truncated_rollout=False."
        )
    if fsdp_version == 1:
        raise ValueError(
            "fsdp_version: the processes of FSDP1 would have to sample in step, which truncated rollouts do not. Set "
            "fsdp_version: 2 in the accelerate config, use_vllm=True or truncated_rollout=False."
        )
