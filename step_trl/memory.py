"""How much memory a training takes, from the model's configuration alone: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from trl import ModelConfig, get_peft_config


LEFT_OUT = (
    "what sharding over processes saves, buffers of DDP, activations within a layer, chunks of logits, CUDA's own "
    "memory, fragmentation"
)


@dataclass
class MemoryEstimate:
    """
    Bytes on each process, by what they are for.

    Attributes:
        parameters (`int`), trainable (`int`):
            Numbers of them.
        lasting (`dict[str, int]`):
            There all the time.
        passing (`dict[str, int]`):
            There while completions are generated, or while they are learned from, but not both.
        left_out (`list[str]`):
            What this run has that is not counted, besides `LEFT_OUT`.
    """

    parameters: int
    trainable: int
    lasting: dict[str, int] = field(default_factory=dict)
    passing: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """At its peak."""
        return sum(self.lasting.values()) + max(self.passing.values(), default=0)


def empty_model(config: PretrainedConfig, options: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, in the type in which it is trained, with its adapter if it has one."""
    dtype = getattr(config, "dtype", None) if options.dtype in ("auto", None) else getattr(torch, str(options.dtype))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
        if (adapter := get_peft_config(options)) is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
    return model


def estimate_memory(
    config: PretrainedConfig,
    options: ModelConfig,
    *,
    optimizer: str,
    has_reference: bool,
    gradient_checkpointing: bool,
    micro_batch: int,
    cached_completions: int,
    max_length: int,
) -> MemoryEstimate:
    """
    Estimate the memory of one process.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Of the model.
        options ([`~trl.ModelConfig`]):
            Its type and adapter.
        optimizer (`str`):
            `optim` of the training.
        has_reference (`bool`):
            Whether the KL term needs a reference model: `beta` is not 0.
        gradient_checkpointing (`bool`):
            Whether only the inputs of layers are kept for the backward pass.
        micro_batch (`int`):
            Completions of one forward pass.
        cached_completions (`int`):
            Completions that are generated in this process at once.
        max_length (`int`):
            Tokens of the longest prompt and completion together.
    """
    model = empty_model(config, options)
    weights = calculate_maximum_sizes(model)[0]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, count = sum(p.nbytes for p in trained), sum(p.numel() for p in trained)
    estimate = MemoryEstimate(sum(p.numel() for p in model.parameters()), count)
    estimate.lasting |= {"weights": weights, "gradients": gradients}
    if "adam" in optimizer:  # two states, in the type of the weights or in a byte
        estimate.lasting["Adam states"] = 2 * (count if "8bit" in optimizer else gradients)
    else:
        estimate.left_out.append(f"states of optim={optimizer}")
    if has_reference and not options.use_peft:  # otherwise the policy without its adapter
        estimate.lasting["reference model"] = weights
    if options.load_in_4bit or options.load_in_8bit:
        estimate.left_out.append("what quantisation saves")
    text = config.get_text_config()
    if gradient_checkpointing:
        inputs = text.num_hidden_layers * text.hidden_size * model.dtype.itemsize
        estimate.passing["inputs of layers"] = micro_batch * max_length * inputs
    else:
        estimate.left_out.append("activations, as gradient_checkpointing is off")
    estimate.passing["KV cache"] = cached_completions * max_length * _cache_bytes(model)
    return estimate


def _cache_bytes(model: PreTrainedModel) -> int:
    """Of one token, by a forward pass on the meta device, so that each architecture counts in its own way."""
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
