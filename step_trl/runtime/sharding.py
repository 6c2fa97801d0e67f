"""
Completions from a model whose parameters are sharded over processes, each of which samples at its own pace.

Only rollouts of our own need this: transformers' `generate` keeps the processes in step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


@contextmanager
def whole_parameters(model: PreTrainedModel, reshard_after_forward: bool) -> Iterator[None]:
    """
    Hold all parameters of a model that FSDP2 shards on every process. Every process must enter.

    FSDP2 gathers a layer's parameters in each of its forward passes, which is a collective operation, and processes
    run different numbers of them. This is what TRL does under ZeRO-3 (`ds3_gather_for_generation`).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            As accelerate prepared it. Others are left alone.
        reshard_after_forward (`bool`):
            What it was prepared with, and goes back to.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        # accelerate keeps what the end of the forward pass used: the backward pass begins with it.
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward, recurse=False)
            unit.reshard()
        for last in (model, model.get_output_embeddings()):
            if isinstance(last, FSDPModule):
                last.set_reshard_after_forward(False, recurse=False)


def check_reference_model(cpu_ram_efficient_loading: bool) -> None:
    """
    Refuse a reference model that FSDP2 would leave without weights.

    Only the first process reads weights then. accelerate sends the policy's to the others, but it is TRL that shards
    the reference model.

    Args:
        cpu_ram_efficient_loading (`bool`):
            Of the FSDP plugin.
    """
    if cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: the reference model of beta would have no weights but on the first "
            "process. Set it to false in the accelerate config, or beta=0.0."
        )


def check_rollouts_in_process(zero_stage: int, fsdp_version: int | None, gather_for_generation: bool) -> None:
    """
    Refuse what would deadlock: processes that run different numbers of forward passes of a sharded model.

    Args:
        zero_stage (`int`):
            Of DeepSpeed, 0 without it.
        fsdp_version (`int`, *optional*):
            1, 2 or none.
        gather_for_generation (`bool`):
            TRL's `ds3_gather_for_generation`.
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
