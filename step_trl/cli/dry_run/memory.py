"""
Estimate the memory that a training takes on each GPU, from the model's configuration alone.

The estimate counts weights, gradients and optimizer states as DDP, DeepSpeed or FSDP distributes them, the reference
model, rollouts, key-value caches, activations with and without gradient checkpointing, and the tiles in which TRL
computes log-probabilities: it never holds the logits of all tokens. It does not count the CUDA context, NCCL buffers
and fragmentation, for which [`RESERVE`] of the GPU is left free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig
from trl import ModelConfig
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_CHUNK_SIZE

from .layout import Layout
from .model_size import ModelSize, model_size


RESERVE = 0.1
ROLLOUT_BYTES = 32  # per token: ids and mask (8 each), log-probabilities of server, policy and reference, and a ratio
DEEPSPEED_BUCKET = 500_000_000  # elements of its default reduce_bucket_size; two are in use
DEEPSPEED_LIVE = 1_000_000_000  # elements of its default stage3_max_live_parameters


@dataclass(frozen=True)
class Workload:
    """
    What one process of a training computes and stores.

    Attributes:
        model ([`~trl.ModelConfig`]), layout ([`~step_trl.cli.dry_run.layout.Layout`]):
            The dtype and the adapter of the model, and what is sharded over how many processes.
        max_length (`int`):
            The number of tokens of the longest prompt and completion together.
        micro_batch (`int`):
            The number of completions per forward pass.
        optimizer (`str`), bf16 (`bool`):
            The `optim` of the training, and whether it computes in bfloat16.
        has_reference (`bool`):
            Whether the KL term needs a reference model, because `beta` is not 0.
        gradient_checkpointing (`bool`):
            Whether only the inputs of layers are kept for the backward pass.
        accumulates_unshared (`bool`):
            Whether FSDP sums the gradients of an update's micro-batches before it reduces them, as it does without
            `sync_each_batch`.
        padded (`bool`):
            Whether micro-batches can have padding, for which attention needs a mask.
        kept_completions (`int`):
            The number of completions of a generation batch that are kept for the updates on them.
        cached_completions (`int`), samples_whole (`bool`):
            The number of completions that this process generates at once, and whether it does with all weights
            gathered.
        vllm_share (`float`):
            The share of the GPU that a colocated vLLM takes.
    """

    model: ModelConfig
    layout: Layout
    max_length: int
    micro_batch: int
    optimizer: str = "adamw_torch_fused"
    bf16: bool = False
    has_reference: bool = False
    gradient_checkpointing: bool = True
    accumulates_unshared: bool = False
    padded: bool = False
    kept_completions: int = 0
    cached_completions: int = 0
    samples_whole: bool = False
    vllm_share: float = 0.0

    @property
    def tokens(self) -> int:
        """The number of tokens per micro-batch."""
        return self.micro_batch * self.max_length


@dataclass
class MemoryEstimate:
    """
    The bytes that each process uses, by purpose.

    Attributes:
        parameters (`int`), trainable (`int`):
            The number of all parameters and of trainable ones.
        lasting (`dict[str, int]`), phases (`dict[str, dict[str, int]]`):
            Memory that is used throughout the training, and only in one phase of it.
        left_out (`list[str]`):
            Whatever this run uses that is not counted.
    """

    parameters: int
    trainable: int
    lasting: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def peak(self) -> str:
        """Return the phase that takes the most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> int:
        """Return the bytes at the peak."""
        return sum(self.lasting.values()) + sum(self.phases[self.peak].values())

    def __str__(self) -> str:
        lasting, passing = (
            ", ".join(f"{name} {size_text(count)}" for name, count in parts.items())
            for parts in (self.lasting, self.phases[self.peak])
        )
        trained = f", {self.trainable:,} of them trained" * (self.trainable < self.parameters)
        left_out = f"; left out: {', '.join(self.left_out)}" * bool(self.left_out)
        return (
            f"about {size_text(self.total)} per process for {self.parameters:,} parameters{trained}: {lasting}; and "
            f"at the peak, {self.peak}: {passing}{left_out}"
        )


def size_text(count: int) -> str:
    """Return bytes as text, in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def estimate_memory(config: PretrainedConfig, work: Workload) -> MemoryEstimate:
    """Estimate the memory of one process, from the model's configuration."""
    size = model_size(config, work.model, work.bf16)
    estimate = MemoryEstimate(size.parameters, size.trainable, _states(size, work), _phases(size, work))
    if "adam" not in work.optimizer:
        estimate.left_out.append(f"states of optim={work.optimizer}")
    if work.model.load_in_4bit or work.model.load_in_8bit:
        estimate.left_out.append("what quantisation saves")
    if size.recurrent:
        estimate.left_out.append("what fused kernels of recurrent layers save")
    if work.model.attn_implementation == "eager":
        estimate.left_out.append("the matrices of scores of attn_implementation=eager")
    if size.num_layers == 0:
        estimate.left_out.append("activations, as the model does not mark its layers")
    if work.vllm_share and work.layout.gpu_memory is None:
        estimate.left_out.append(f"the {work.vllm_share:.0%} of the GPU that vLLM takes")
    return estimate


def _states(size: ModelSize, work: Workload) -> dict[str, int]:
    layout, trainable = work.layout, size.trainable
    weights, gradients, master = size.weights, size.trained, 0
    if work.bf16 and layout.engine == "fsdp":  # accelerate trains weights in float32, and gathers them in bfloat16
        gradients = 4 * trainable
        weights = size.weights - size.trained + gradients
    elif work.bf16 and layout.engine == "deepspeed":  # has float32 weights beside those in bfloat16
        weights, gradients, master = 2 * size.parameters, 2 * trainable, 4 * trainable
    states = 2 * (master or gradients)
    if "8bit" in work.optimizer:
        states = 2 * trainable
    on_gpu, optimizer_on_gpu = not layout.offload_parameters, not layout.offload_optimizer
    lasting = {
        "weights": on_gpu * layout.share(weights, 3),
        "gradients": on_gpu * layout.share(gradients, 2),
        "float32 weights": optimizer_on_gpu * layout.share(master, 1),
        "Adam states": optimizer_on_gpu * layout.share(states, 1) * ("adam" in work.optimizer),
        "buckets of DDP": gradients * (layout.engine == "ddp" and layout.processes > 1),
        # With an adapter, the reference is the policy without it.
        "reference model": layout.share(size.weights, 3) * (work.has_reference and not work.model.use_peft),
        "rollouts": work.kept_completions * work.max_length * ROLLOUT_BYTES,
        "vLLM": int(work.vllm_share * (layout.gpu_memory or 0)),
    }
    return {name: count for name, count in lasting.items() if count}


def _phases(size: ModelSize, work: Workload) -> dict[str, dict[str, int]]:
    whole = size.parameters * _item(size, work)
    gathered = whole if work.layout.stage == 3 else 0
    # TRL wraps the whole reference model as one unit: FSDP gathers it into one buffer, and unpacks that.
    reference = work.has_reference * (not work.model.use_peft) * _live(gathered, size, work)
    upcast = work.layout.engine == "deepspeed" and work.bf16 and not work.layout.offload_optimizer
    phases = {
        "sampling": {
            "KV cache": work.cached_completions * work.max_length * size.cache,
            "all weights, gathered": gathered * work.samples_whole,
        },
        "gathering of the reference model": {
            "reference model, gathered": reference,
            "the same, as it arrives": reference * (work.layout.engine == "fsdp"),
        },
        "reference log-probabilities": {"reference model, gathered": reference, "a layer": size.layer * work.tokens},
        "log-probabilities": _head(size, work),
        "backward pass": _backward(size, work),
        "optimizer step": {"float32 gradients": work.layout.share(4 * size.trainable, 1) * upcast},
    }
    return {phase: {name: count for name, count in parts.items() if count} for phase, parts in phases.items()}


def _head(size: ModelSize, work: Workload) -> dict[str, int]:
    """Return the memory during the loss: all that the forward pass has kept, and the fused LM head of TRL."""
    item, head = _item(size, work), size.head_parameters
    states = work.tokens * size.hidden_size
    return _kept(size, work) | {
        "a tile of logits": min(work.tokens, TOKEN_CHUNK_SIZE) * VOCABULARY_CHUNK_SIZE * item,
        "last hidden states and their gradient": states * (4 + 2 * item),
        "gradient of the head": head * (4 + item) * size.head_trained,
        "the head, gathered": head * item * (2 if work.layout.stage == 3 else 0),  # and its gradient, to be shared
    }


def _backward(size: ModelSize, work: Workload) -> dict[str, int]:
    """Return the memory during the backward pass: what is kept, and all of one layer."""
    item, layout = _item(size, work), work.layout
    layer = size.layer_parameters * item
    if layout.engine == "deepspeed":
        buckets = 2 * min(size.trainable, DEEPSPEED_BUCKET) * item * (layout.stage >= 1)
    else:
        buckets = 2 * layer * (layout.stage == 3)
    return _kept(size, work) | {
        "a layer": (size.layer * work.gradient_checkpointing + 2 * size.widest) * work.tokens,
        # One layer in use, the next one as it arrives, and as it is unpacked.
        "layers, gathered": _live(3 * layer, size, work) if layout.stage == 3 else 0,
        "gradients to be shared": buckets,
    }


def _kept(size: ModelSize, work: Workload) -> dict[str, int]:
    """Return the memory that the forward pass keeps for the backward pass, and what it needs besides."""
    item = _item(size, work)
    # Weights in float32 that compute in bfloat16 without FSDP: activations between layers stay float32.
    autocast = work.bf16 and work.layout.engine == "ddp" and size.weights // size.parameters >= 4
    inputs = size.layer_inputs * (2 if autocast else 1)
    is_flash = "flash" in (work.model.attn_implementation or "")
    mask = work.micro_batch * work.max_length**2 if work.padded and not is_flash else 0
    masks = 1 if work.gradient_checkpointing else size.num_layers
    return {
        "inputs of layers": inputs * work.tokens * work.gradient_checkpointing,
        "activations": size.layers * work.tokens * (not work.gradient_checkpointing),
        "activations outside of layers": size.outside * work.tokens,
        "attention masks": mask * (1 + item * masks),
        "bfloat16 copies of weights": 2 * size.parameters * autocast,
        "gradients, whole": size.trainable * item * work.accumulates_unshared,
    }


def _live(count: int, size: ModelSize, work: Workload) -> int:
    """Return the number of gathered weights. DeepSpeed keeps gathering until it reaches a limit."""
    if work.layout.engine != "deepspeed" or not count:
        return count
    return min(size.parameters, DEEPSPEED_LIVE) * _item(size, work)


def _item(size: ModelSize, work: Workload) -> int:
    """Return the bytes per number in the computation."""
    return 2 if work.bf16 else size.weights // size.parameters


def remedies(config: PretrainedConfig, work: Workload) -> list[tuple[str, int]]:
    """Return the settings that lower the peak, and the bytes that each saves by itself, largest first."""
    total = estimate_memory(config, work).total
    saved = [(words, total - estimate_memory(config, other).total) for words, other in _alternatives(work)]
    return sorted(((words, count) for words, count in saved if count > total // 100), key=lambda one: -one[1])


def _alternatives(work: Workload) -> Iterator[tuple[str, Workload]]:
    layout, model = work.layout, work.model
    if work.cached_completions:
        yield "use_vllm=true with a server", replace(work, cached_completions=0, samples_whole=False)
        fewer = max(1, work.cached_completions // 8)
        yield f"max_rollouts_in_flight={fewer}", replace(work, cached_completions=fewer)
    if work.micro_batch > 1:
        yield "per_device_train_batch_size=1", replace(work, micro_batch=1, padded=False)
    if not work.gradient_checkpointing:
        yield "gradient_checkpointing=true", replace(work, gradient_checkpointing=True)
    if layout.stage < 3 and not model.use_peft:
        processes = max(layout.processes, 8)
        sharded = replace(layout, engine="fsdp", stage=3, processes=processes)
        yield f"recipes/accelerate_configs/fsdp2.yaml on {processes} GPUs", replace(work, layout=sharded)
    if layout.stage == 3:
        more = 2 * layout.processes
        yield f"--num-processes {more}", replace(work, layout=replace(layout, processes=more))
    if work.accumulates_unshared:
        words = "sync_each_batch=true in gradient_accumulation_kwargs of accelerator_config"
        yield words, replace(work, accumulates_unshared=False)
    if work.has_reference:
        yield "beta=0.0", replace(work, has_reference=False)
    if not model.use_peft:
        yield "use_peft=true", replace(work, model=replace(model, use_peft=True))
    if "8bit" not in work.optimizer:
        yield "optim=adamw_8bit", replace(work, optimizer="adamw_8bit")
    if work.vllm_share > 0.2:
        yield "vllm_gpu_memory_utilization=0.2", replace(work, vllm_share=0.2)
    yield "half of max_completion_length", replace(work, max_length=work.max_length // 2)
