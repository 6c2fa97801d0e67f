"""Options that the trainers share: length rewards, micro-batches, vLLM servers and how they receive weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import GRPOConfig

from ..rewards.length_rewards import check_length_reward


def check_precision(args: TrainingArguments) -> None:
    """Raise an error that names the remedy where bfloat16, TRL's default, cannot be computed in."""
    bf16 = not args.fp16 if args.bf16 is None else args.bf16  # as TRL's configurations decide
    if bf16 and not (args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        raise ValueError(
            "bf16: this machine has no GPU that computes in bfloat16, in which TRL trains by default. Set bf16=False "
            "to train in float32."
        )


@dataclass
class EfficientReasoningConfig(GRPOConfig):
    r"""
    [`~trl.GRPOConfig`] with what long completions and rollouts on vLLM servers need.

    Args:
        vllm_server_base_url (`list[str]`, *optional*):
            URL of the vLLM server, as in [`~trl.GRPOConfig`], or several of them: the prompts are spread over them.
        length_reward (`str`, *optional*):
            A reward for short completions that is added to the correctness: `"kimi"`, `"soft_overlong"`,
            `"grpo_lambda"`, `"train_efficiently"`, `"l1_exact"`, `"l1_max"`, `"lapo_discovery"` or
            `"lapo_internalization"`, see [`~step_trl.rewards`]; with [`StepGRPOConfig`] also `"s_grpo"`. It is
            computed over the global batch, and logged in a column of its own, without the correctness.
        length_reward_weight (`float`, *optional*, defaults to `1.0`):
            Weight of that column.
        length_reward_options (`dict`, *optional*):
            Options of that reward, such as `{"alpha": 0.2}`.
        lapo_lengths (`str`, *optional*):
            File of the lengths that LAPO's first stage found, for `length_reward="lapo_internalization"`. By default
            `lapo_lengths.json` in the model's folder, where the first stage saves it.
        require_end_of_thinking (`bool`, *optional*, defaults to `False`):
            Whether the default reward, math accuracy, is 0 for a completion without `</think>`. True in
            [`SASConfig`]: set it in what SAS is compared with, so that both train on the same reward.
        reduce_padding (`bool`, *optional*, defaults to `True`):
            Put completions of like length into one micro-batch of an update, and leave out the columns that are
            padding in all of its rows. Neither changes the gradient of an update but for rounding. Completions stay
            where they are if it would: with loss type `"bnpo"`, `top_entropy_quantile` below 1, an entropy bonus, a
            router's auxiliary loss, or images. With `False`, micro-batches are TRL's, and so are all results, to the
            bit.
        seeded_rollouts (`bool`, *optional*):
            Give each completion of a truncated rollout a seed of its own, drawn from `seed` and its place in the batch
            of all processes, so that a run can be repeated. By default in process but not on servers: vLLM samples
            seeded requests one by one.
        weight_sync (`str`, *optional*, defaults to `"nccl"`):
            How servers receive the policy's weights: `"nccl"` is TRL's way, for one server and GPUs; `"disk"` saves
            them to a folder that the servers read, for machines without NCCL and for several servers.
        weight_sync_dir (`str`, *optional*):
            Folder of `weight_sync="disk"`, seen under the same path by this process and by every server. Defaults to
            `weight_sync` below `output_dir`.
        weight_sync_check_every (`int`, *optional*, defaults to `100`):
            After the first synchronisation, and again when this many updates have passed, the servers'
            log-probabilities are compared with the policy's; `0` never compares.
        num_completions_to_log (`int`, *optional*, defaults to `8`):
            Completions that are shown in trackers at each logging step: in a table that keeps all steps, and the
            first ones as pictures. `0` for none. TRL's `log_completions` and its table are independent of it.
    """

    # Symbol to field, as the papers write them; the KL weight and the step penalty are both called beta there.
    _SYMBOLS: ClassVar[dict[str, str]] = {"G": "num_generations", "beta (KL)": "beta", "epsilon": "epsilon"}

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "length_reward_options"]

    length_reward: str | None = field(
        default=None, metadata={"help": "Reward for short completions that is added to the correctness, by its name."}
    )
    length_reward_weight: float = field(default=1.0, metadata={"help": "Weight of the length reward."})
    length_reward_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the length reward."}
    )
    lapo_lengths: str | None = field(default=None, metadata={"help": "File of the lengths of LAPO's first stage."})
    vllm_server_base_url: list[str] | None = field(  # type: ignore[assignment]  # TRL's holds one
        default=None, metadata={"help": "URL of the vLLM server, or of several that share the prompts."}
    )
    require_end_of_thinking: bool = field(
        default=False, metadata={"help": "The default reward is 0 for a completion without </think>."}
    )
    reduce_padding: bool = field(
        default=True, metadata={"help": "Put completions of like length into one micro-batch, and trim its padding."}
    )
    seeded_rollouts: bool | None = field(
        default=None, metadata={"help": "Give each completion a seed of its own. By default in process only."}
    )
    weight_sync: str = field(default="nccl", metadata={"help": "How servers receive weights: 'nccl' or 'disk'."})
    weight_sync_dir: str | None = field(
        default=None, metadata={"help": "Folder of weight_sync='disk', seen by trainer and servers."}
    )
    weight_sync_check_every: int = field(
        default=100, metadata={"help": "Updates between two checks of the servers' weights; 0 for none."}
    )
    num_completions_to_log: int = field(
        default=8, metadata={"help": "Completions that trackers show at each logging step; 0 for none."}
    )

    def __post_init__(self):
        check_precision(self)
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # a no-op there, about which torch warns at every epoch
        if self.num_completions_to_log < 0:
            raise ValueError(f"num_completions_to_log: {self.num_completions_to_log} is negative. Set 0 to show none.")
        if self.length_reward is not None:
            check_length_reward(self.length_reward, self.length_options())
        elif self.length_reward_options is not None:
            raise ValueError("length_reward_options: there is no length_reward. Set one, or drop its options.")
        self._check_serial_group()
        if self.weight_sync not in ("nccl", "disk"):
            raise ValueError(f"weight_sync: {self.weight_sync!r} is not known. Set 'nccl' or 'disk'.")
        if self.weight_sync_check_every < 0:
            raise ValueError(
                f"weight_sync_check_every: {self.weight_sync_check_every} is negative. Set 0 to compare never."
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

    def _check_serial_group(self) -> None:
        if self.length_reward == "s_grpo":
            raise ValueError("length_reward: 's_grpo' needs StepGRPOConfig and its serial_group=True.")

    def length_options(self) -> dict[str, Any]:
        """`length_reward_options`, which may be none."""
        # The parent's __post_init__ has read a JSON text from the command line.
        return self.length_reward_options if isinstance(self.length_reward_options, dict) else {}

    def symbols(self) -> dict[str, Any]:
        """Values of the method's symbols, under the papers' names."""
        return {symbol: getattr(self, name) for symbol, name in self._SYMBOLS.items()}

    def server_urls(self) -> list[str]:
        """The servers of `vllm_mode="server"`."""
        if self.vllm_server_base_url is None:
            return [f"http://{self.vllm_server_host}:{self.vllm_server_port}"]
        urls = self.vllm_server_base_url
        return [urls] if isinstance(urls, str) else list(urls)
