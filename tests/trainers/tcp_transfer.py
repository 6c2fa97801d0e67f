"""
Weight transfer over TCP, in place of NCCL's: all of TRL's server mode but its transport, on CPUs.

The server's side is [`TCPWeightTransferEngine`], which a server knows by the name "tcp" when it is started with
`SERVER_ARGUMENTS`. It is vLLM's own engine for NCCL: it takes the same messages, and receives the same packed buffers
by vLLM's own function. Only how it joins the group, and how a buffer is broadcast in it, are others.

The trainer's side is [`weights_over_tcp`], which replaces what TRL and vLLM refuse on a CPU, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from trl.generation import vllm_client
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


SERVER_ARGUMENTS = (
    "--weight-transfer-config", '{"backend": "tcp"}', "--worker-extension-cls", "trainers.tcp_transfer.Registered",
)  # fmt: skip


class TCPCommunicator:
    """The parts of a `PyNcclCommunicator` that TRL and vLLM use, over the group's own TCP store."""

    def __init__(self, group: StatelessProcessGroup):
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        tensor.copy_(self.group.broadcast(tensor, src))


class NoStream:
    """Replaces a `torch.cuda.Stream`: everything is done when its call returns."""

    def synchronize(self) -> None:
        pass


@contextmanager
def without_streams() -> Iterator[None]:
    """
    On both sides, in vLLM's `packed_nccl_broadcast_producer` and `packed_nccl_broadcast_consumer`:

    - `streams = _get_streams(torch.accelerator.current_device_index(), num_buffers)`
    - `with torch.cuda.stream(streams[buffer_idx]):`
    """
    packed = "vllm.distributed.weight_transfer.packed_tensor"
    with (
        patch("torch.accelerator.current_device_index", lambda: 0),
        patch(f"{packed}._get_streams", lambda device, number: (NoStream(),) * number),
        patch("torch.cuda.stream", lambda stream: nullcontext()),
    ):
        yield


class TCPWeightTransferEngine(NCCLWeightTransferEngine):
    """The server's side."""

    def init_transfer_engine(self, init_info):
        with patch(
            "vllm.distributed.weight_transfer.nccl_common.stateless_init_process_group", init_process_group
        ), without_streams():  # fmt: skip
            super().init_transfer_engine(init_info)

    def receive_weights(self, update_info):
        with without_streams():
            super().receive_weights(update_info)


def init_process_group(master_address, master_port, rank, world_size, device) -> TCPCommunicator:
    """Replaces vLLM's `stateless_init_process_group`, which creates a `PyNcclCommunicator` of the same group."""
    return TCPCommunicator(StatelessProcessGroup.create(master_address, master_port, rank, world_size))


class Registered:
    """Loaded by `--worker-extension-cls` before the worker creates its engine. It adds nothing to the worker."""


WeightTransferEngineFactory.register_engine("tcp", TCPWeightTransferEngine)


@contextmanager
def weights_over_tcp() -> Iterator[None]:
    """
    The trainer's side. What TRL's `VLLMClient` refuses on a CPU is replaced, line by line:

    - `init_communicator`: `if device.type != "cuda": raise NotImplementedError`. It is told "cuda", without an index,
      so that it sets no device.
    - `init_communicator`: `self.communicator = open_trainer_endpoint(init_info)`, which makes a `PyNcclCommunicator`,
      makes one of the same group over TCP.
    - `update_named_params`: `packed_nccl_broadcast_producer(...)` runs as it is, [`without_streams`].
    """
    init_communicator = vllm_client.VLLMClient.init_communicator

    def on_cuda(self, device):
        init_communicator(self, torch.device("cuda"))

    def open_endpoint(init_info):
        return init_process_group(init_info["master_address"], init_info["master_port"], 0, init_info["world_size"], 0)

    with (
        patch.object(vllm_client.VLLMClient, "init_communicator", on_cuda),
        patch.object(vllm_client, "open_trainer_endpoint", open_endpoint),
        without_streams(),
    ):
        yield
