"""Measure a model's memory on the meta device, so that nothing is loaded or computed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import ModelConfig, get_peft_config


COUNTED_TOKENS = 64  # of the forward pass that is counted; what it keeps grows with them in proportion
_FUSED = "step_trl_fused"  # the name of `fused_attention` in transformers


@dataclass(frozen=True)
class ModelSize:
    """
    The parameters of a model, and the bytes that they and its activations take.

    Attributes:
        parameters (`int`), trainable (`int`):
            The number of all parameters and of trainable ones.
        weights (`int`), trained (`int`):
            The bytes of all weights and of trainable ones, in the dtypes in which they are loaded.
        layer_parameters (`int`):
            The number of parameters of the largest layer.
        head_parameters (`int`), head_trained (`bool`), hidden_size (`int`):
            The number of parameters of the output embeddings, whether they are trained, and their hidden size.
        num_layers (`int`):
            The number of layers that gradient checkpointing recomputes.
        layer_inputs (`int`), layer (`int`), layers (`int`), outside (`int`):
            The bytes per token that a forward pass keeps for the backward pass: the inputs of all layers, everything
            within the largest layer, within all layers, and outside of them.
        widest (`int`):
            The bytes per token of the largest tensor that is kept.
        cache (`int`):
            The bytes per token of the key-value cache.
        recurrent (`bool`):
            Whether layers have states that each token changes. Their activations are those of the implementation
            without a fused kernel.
    """

    parameters: int
    trainable: int
    weights: int
    trained: int
    layer_parameters: int
    head_parameters: int
    head_trained: bool
    hidden_size: int
    num_layers: int
    layer_inputs: int
    layer: int
    layers: int
    outside: int
    widest: int
    cache: int
    recurrent: bool = False


_sizes: dict[str, ModelSize] = {}


def model_size(config: PretrainedConfig, options: ModelConfig, bf16: bool) -> ModelSize:
    """
    Measure the sizes of a model, in the dtype and with the adapter of its options.

    With `bf16`, it computes in bfloat16, whatever the dtype of its weights.
    """
    key = f"{config.to_json_string()} {options} {bf16}"
    if key not in _sizes:
        _sizes[key] = _measure(config, options, bf16)
    return _sizes[key]


def _measure(config: PretrainedConfig, options: ModelConfig, bf16: bool) -> ModelSize:
    model = empty_model(config, options)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    head = model.get_output_embeddings().weight
    return ModelSize(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trained),
        weights=sum(p.nbytes for p in parameters),
        trained=sum(p.nbytes for p in trained),
        layer_parameters=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        head_parameters=head.numel(),
        head_trained=head.requires_grad,
        hidden_size=head.shape[1],
        num_layers=len(layers),
        recurrent=model._is_stateful,
        **_token_sizes(model, bf16),
    )


def _token_sizes(model: PreTrainedModel, bf16: bool) -> dict[str, Any]:
    """Return the bytes per token of the cache, which has the dtype of the weights, and of the activations."""
    held = model.dtype.itemsize
    computed = torch.bfloat16.itemsize if bf16 else held
    if bf16 or model._can_set_experts_implementation():  # on the meta device, experts compute in bfloat16 only
        model = cast("Any", model).to(torch.bfloat16)
    own = model.dtype.itemsize
    cache = _cache_bytes(model) * held // own
    return {"cache": cache} | {name: size * computed // own for name, size in activation_sizes(model).items()}


def empty_model(config: PretrainedConfig, options: ModelConfig) -> PreTrainedModel:
    """Return the model on the meta device, in the dtype in which it is trained, with its adapter if it has one."""
    dtype = getattr(config, "dtype", None) if options.dtype in ("auto", None) else getattr(torch, str(options.dtype))
    with torch.device("meta"):  # accelerate's `init_empty_weights` would untie the embeddings
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_config(config, dtype=dtype or torch.float32)
        if (adapter := get_peft_config(options)) is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
    return model


def _cache_bytes(model: PreTrainedModel) -> int:
    """Return the key-value cache's bytes per token, by a forward pass on the meta device of any architecture."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True)
    # Recurrent layers and those that read the keys of others have none, and states do not grow with the tokens.
    layers = output.past_key_values.layers if hasattr(output, "past_key_values") else []
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def activation_sizes(model: PreTrainedModel) -> dict[str, Any]:
    """
    Measure what a forward pass of a model's layers keeps for the backward pass, per token.

    Autograd reports every tensor that it keeps. Each storage is counted once, and weights are not counted. Attention
    is counted as a fused kernel, which keeps no matrix of scores. The model is on the meta device. The keys of the
    result are fields of [`ModelSize`].
    """
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}
    inputs: list[int] = []
    place = [-1]  # of the layer that runs; -1 outside of them
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held in `kept`, so that no other gets its address
        if storage._cdata not in weights:
            kept.setdefault(storage._cdata, (storage, place[0]))
        return tensor

    def enter(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        place[0] = len(inputs)
        inputs.append(arguments[0].nbytes)

    def leave(layer: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        place[0] = -1

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    run_fused(model, pack)
    bytes_at: dict[int, int] = defaultdict(int)
    for storage, layer in kept.values():
        bytes_at[layer] += storage.nbytes()
    outside = bytes_at.pop(-1, 0)
    totals = {
        "layer_inputs": sum(inputs),
        "layer": max(bytes_at.values(), default=0),
        "layers": sum(bytes_at.values()),
        "outside": outside,
        "widest": max((storage.nbytes() for storage, layer in kept.values() if layer >= 0), default=0),
    }
    return {name: total // COUNTED_TOKENS for name, total in totals.items()}


def run_fused(model: PreTrainedModel, pack: Any) -> None:
    """Run a forward pass of the layers with fused attention, and call `pack` on each tensor that is kept."""
    AttentionInterface.register(_FUSED, fused_attention)
    AttentionMaskInterface.register(_FUSED, lambda *arguments, **options: None)
    model.set_attn_implementation(_FUSED)
    model.enable_input_require_grads()  # as gradient checkpointing does with an adapter
    tokens = torch.zeros(1, COUNTED_TOKENS, dtype=torch.long, device="meta")
    # Models with recurrent layers and attention look whether any token is padding, those without attention do not.
    mask = torch.ones_like(tokens, device="cpu" if model._supports_sdpa else "meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)


def fused_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as `scaled_dot_product_attention` does on a GPU with a mask: heads are repeated."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output = efficient(query, key, value, None, True, dropout, True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None
