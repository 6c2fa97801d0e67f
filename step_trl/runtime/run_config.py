"""Options for long runs with any method: rollouts on vLLM servers, micro-batches, and what trackers show."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import GRPOConfig


def check_precision(args: TrainingArguments) -> None:
    """Raise an error that names the remedy if bfloat16, TRL's default, is not supported."""
    bf16 = not args.fp16 if args.bf16 is None else args.bf16  # as TRL's configurations decide
    if bf16 and not (args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        raise ValueError(
            "bf16: this machine has no GPU that computes in bfloat16, in which TRL trains by default. Set bf16=False "
            "to train in float32."
        )


def drop_pin_memory(args: TrainingArguments) -> None:
    """Do not pin memory without an accelerator: it is a no-op there, about which torch warns at every epoch."""
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False


@dataclass
class RunConfig(GRPOConfig):
    r"""
    A [`~trl.GRPOConfig`] with options for long completions and rollouts on vLLM servers.

    Args:
        vllm_server_base_url (`list[str]`, *optional*):
            The URL of the vLLM server, as in [`~trl.GRPOConfig`], or several URLs of servers that share the prompts.
        reduce_padding (`bool`, *optional*, defaults to `True`):
            Whether to put completions of similar length into one micro-batch of an update, and to drop the columns
            that are padding in all of its rows. Neither changes the gradient of an update, apart from rounding.
            Completions are not moved if that would change it: with loss type `"bnpo"`, `top_entropy_quantile` below 1,
            an entropy bonus, a router's auxiliary loss, or images. With `False`, micro-batches are TRL's, and all
            results are bitwise equal to TRL's.
        seeded_rollouts (`bool`, *optional*):
            Whether each completion of a rollout that is not TRL's has its own seed, so that a run can be repeated. By
            default, this is on for in-process generation and off for servers, as vLLM samples seeded requests one by
            one.
        max_rollouts_in_flight (`int`, *optional*):
            The maximum number of concurrent rollouts per process, if they are not TRL's. By default, all of its batch.
            With more rollouts than a vLLM server runs (`--max-num-seqs`), probes wait for thoughts to end.
        weight_sync (`str`, *optional*, defaults to `"nccl"`):
            How servers receive the policy's weights: `"nccl"` is TRL's way, for one server and GPUs; `"disk"` saves
            them to a folder that the servers read, for machines without NCCL and for several servers.
        weight_sync_dir (`str`, *optional*):
            The folder for `weight_sync="disk"`, which this process and every server must see under the same path.
            Defaults to `weight_sync` in `output_dir`.
        weight_sync_check_every (`int`, *optional*, defaults to `100`):
            The number of updates between two comparisons of the servers' log-probabilities with the policy's. The
            first comparison follows the first synchronisation. `0` turns the comparison off.
        rollouts_ahead (`int`, *optional*, defaults to `0`):
            The number of batches that vLLM servers sample while the batch before them is trained on: 0 or 1. With `1`,
            the weights that sample a batch lack the updates on the one before, for which TRL corrects by importance
            sampling. Only for `vllm_mode="server"`, and methods that sample a batch at once.
        num_completions_to_log (`int`, *optional*, defaults to `8`):
            The number of completions that trackers show at each logging step: all of them in a table that keeps all
            steps, and the first ones also as pictures. `0` for none. TRL's `log_completions` and its table are
            independent of it.
        record_rollouts (`bool`, *optional*, defaults to `False`):
            Whether to write all completions of the training, with their rewards and verdicts, to `rollouts/` in
            `output_dir`, for [`~step_trl.preferences.read_rollouts`].
    """

    vllm_server_base_url: list[str] | None = field(  # type: ignore[assignment]  # TRL's holds one
        default=None,
        metadata={"help": "The URL of the vLLM server, or several URLs of servers that share the prompts."},
    )
    reduce_padding: bool = field(
        default=True, metadata={"help": "Put completions of similar length into one micro-batch, and trim padding."}
    )
    seeded_rollouts: bool | None = field(
        default=None,
        metadata={"help": "Give each completion its own seed. By default, only for in-process generation."},
    )
    max_rollouts_in_flight: int | None = field(
        default=None,
        metadata={"help": "The maximum number of concurrent rollouts per process. By default, all of its batch."},
    )
    weight_sync: str = field(default="nccl", metadata={"help": "How servers receive weights: 'nccl' or 'disk'."})
    weight_sync_dir: str | None = field(
        default=None, metadata={"help": "The folder for weight_sync='disk', seen by trainer and servers."}
    )
    weight_sync_check_every: int = field(
        default=100, metadata={"help": "The number of updates between two checks of the servers' weights; 0 for none."}
    )
    rollouts_ahead: int = field(
        default=0,
        metadata={"help": "The number of batches, 0 or 1, that servers sample while the one before is trained on."},
    )
    num_completions_to_log: int = field(
        default=8, metadata={"help": "The number of completions that trackers show at each logging step; 0 for none."}
    )
    record_rollouts: bool = field(
        default=False, metadata={"help": "Write all completions of the training to rollouts/ in output_dir."}
    )

    def __post_init__(self):
        check_precision(self)
        super().__post_init__()
        drop_pin_memory(self)
        if self.num_completions_to_log < 0:
            raise ValueError(f"num_completions_to_log: {self.num_completions_to_log} is negative. Set 0 to show none.")
        if self.max_rollouts_in_flight is not None and self.max_rollouts_in_flight < 1:
            raise ValueError(
                f"max_rollouts_in_flight: {self.max_rollouts_in_flight} allows no rollouts. Set at least 1, or None."
            )
        self._check_weight_sync()
        if self.rollouts_ahead != 0:
            self._check_rollouts_ahead()

    def _check_rollouts_ahead(self) -> None:
        value = self.rollouts_ahead
        if value != 1:
            raise ValueError(f"rollouts_ahead: {value} batches are not supported. Set 1, or 0 for none.")
        if not self.use_vllm or self.vllm_mode != "server":
            raise ValueError(
                f"rollouts_ahead: {value} needs servers, which sample while this process trains. Set use_vllm=True "
                "and vllm_mode='server', or rollouts_ahead=0."
            )
        if not self.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction: False would train on rollouts of older weights, which "
                f"rollouts_ahead={value} gives, as if they were the policy's. Set it to True, or rollouts_ahead=0."
            )

    def _check_weight_sync(self) -> None:
        if self.weight_sync not in ("nccl", "disk"):
            raise ValueError(f"weight_sync: {self.weight_sync!r} is not known. Set 'nccl' or 'disk'.")
        if self.weight_sync_check_every < 0:
            raise ValueError(
                f"weight_sync_check_every: {self.weight_sync_check_every} is negative. Set 0 to never compare."
            )
        if self.weight_sync == "disk" and self.use_vllm and self.vllm_mode != "server":
            raise ValueError(
                f"weight_sync: 'disk' is for servers, but vllm_mode={self.vllm_mode!r}. Set vllm_mode='server', or "
                "leave weight_sync at 'nccl'."
            )
        if isinstance(self.vllm_server_base_url, str):
            self.vllm_server_base_url = [self.vllm_server_base_url]
        if self.weight_sync == "nccl" and self.vllm_server_base_url is not None:
            if len(self.vllm_server_base_url) > 1:
                raise ValueError(
                    f"vllm_server_base_url: {len(self.vllm_server_base_url)} servers, but weight_sync='nccl' reaches "
                    "one. Set weight_sync='disk' and a folder that all of them read."
                )
            self.vllm_server_base_url = self.vllm_server_base_url[0]  # type: ignore[assignment]

    def server_urls(self) -> list[str]:
        """Return the URLs of the servers of `vllm_mode="server"`."""
        return server_urls(self.vllm_server_base_url, self.vllm_server_host, self.vllm_server_port)


def server_urls(base_url: list[str] | str | None, host: str, port: int) -> list[str]:
    """Return the URLs of vLLM servers: those given, or that of a host and a port."""
    if base_url is None:
        return [f"http://{host}:{port}"]
    return [base_url] if isinstance(base_url, str) else list(base_url)
