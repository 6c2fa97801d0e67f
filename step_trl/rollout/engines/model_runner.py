"""Forward passes over the sequences of a [`RowTable`], with a row cache or without a cache."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .adapters import without_adapter
from .grouped_attention import reading_shared_keys_once
from .image_tokens import ImageTokens
from .row_cache import STATES, RowCache, layer_kinds
from .row_table import RowTable
from .scheduler import EngineStats


logger = logging.getLogger(__name__)
# Tokens of one prefill forward pass, padding included. It bounds the activations and the mask.
_MAX_PREFILL_TOKENS = 8192


def make_model_runner(
    model: PreTrainedModel, stats: EngineStats, images: ImageTokens
) -> CachedModelRunner | UncachedModelRunner:
    """Return the runner for a model. Raises `ValueError` for models that are not causal language models."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"model: {type(model).__name__} is not a causal language model, and TransformersEngine only continues "
            "text. Load one with AutoModelForCausalLM."
        )
    # PEFT's `forward` takes any argument.
    parameters = frozenset(inspect.signature(without_adapter(model).forward).parameters)
    cache_name = next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), None)
    if cache_name is not None and _supports_rows(model):
        return CachedModelRunner(model, parameters, stats, images, cache_name)
    logger.warning(
        "model: the cache of %r cannot hold rows at different positions, so TransformersEngine computes the whole "
        "sequence for each token. A vLLM engine is much faster.",
        model.config.model_type,
    )
    return UncachedModelRunner(model, parameters, stats, images)


def _supports_rows(model: Any) -> bool:
    """Whether the sequences of a batch can be at different positions."""
    kinds = layer_kinds(model.config)
    if kinds is None or not model._supports_default_dynamic_cache():
        return False
    if any(kind.name == STATES for kind in kinds):
        return True
    # `generate` passes prepared masks to these models, too. Others may derive positions from 2D masks (ALiBi).
    return model._supports_attention_backend and model._can_compile_fullgraph


def _inputs(ids: np.ndarray, model: PreTrainedModel, images: ImageTokens) -> dict[str, torch.Tensor]:
    """Return token ids as arguments of the model: as they are, or as embeddings if there are images among them."""
    tokens = torch.from_numpy(ids).to(model.device)
    if len(images) and (ids >= images.first).any():
        return {"inputs_embeds": images.embed(tokens)}
    return {"input_ids": tokens}


class UncachedModelRunner:
    """
    Computes whole sequences for each token, padded on the right. This works for any causal model: what it keeps of a
    sequence does not depend on later tokens.
    """

    def __init__(self, model: PreTrainedModel, parameters: frozenset[str], stats: EngineStats, images: ImageTokens):
        self.model = model
        self.stats = stats
        self.images = images
        self._parameters = parameters

    def new_cache(self) -> RowCache:
        return RowCache()

    def prefill(self, rows: RowTable) -> None:
        """Compute nothing: there is no cache."""
        state = rows.state[: rows.num_active]
        state["cached"] = state["known"] - 1

    def decode(self, rows: RowTable) -> torch.Tensor:
        """Return the logits of the last token of every running sequence, (N, V)."""
        known = rows.state["known"][: rows.num_active]
        at_once = max(1, _MAX_PREFILL_TOKENS // int(known.max()))
        parts = [self._forward(rows, slice(start, start + at_once)) for start in range(0, rows.num_active, at_once)]
        rows.state["cached"][: rows.num_active] = known
        return torch.cat(parts)

    def _forward(self, rows: RowTable, part: slice) -> torch.Tensor:
        known = rows.state["known"][: rows.num_active][part]
        positions, place = np.unique(known - 1, return_inverse=True)
        arguments: dict[str, Any] = {
            **_inputs(rows.tokens[: rows.num_active][part, : known.max()], self.model, self.images),
            "use_cache": False,
        }
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = torch.from_numpy(positions).to(self.model.device)
        else:
            place = known - 1
        self.stats.forwards += 1
        return self.model(**arguments).logits[torch.arange(len(known)), torch.from_numpy(place)]


class CachedModelRunner:
    """Computes only the tokens that are not in the [`RowCache`] yet."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: frozenset[str],
        stats: EngineStats,
        images: ImageTokens,
        cache_name: str,
    ):
        self.model = model
        self.stats = stats
        self.images = images
        self._parameters = parameters
        self._cache_name = cache_name
        self._attention = model.config._attn_implementation
        if self.new_cache().masks(torch.zeros(1, 1, dtype=torch.long), 1) and self._attention not in ("sdpa", "eager"):
            raise ValueError(
                f"model: attention implementation {self._attention!r} is not supported by TransformersEngine. Load "
                "the model with attn_implementation='sdpa', or use a vLLM engine."
            )

    def new_cache(self) -> RowCache:
        return RowCache(self.model.config)

    def prefill(self, rows: RowTable) -> None:
        """
        Compute prompts up to their last token, as long as separate forward passes pay off.

        A row that lacks `lag` tokens can also catch up while decoding, one token per forward pass, and then waits for
        `lag` of them. In a separate forward pass every row waits for one.
        """
        state = rows.state[: rows.num_active]
        while True:
            lag = state["known"] - 1 - state["cached"]
            if rows.cache.recurrent:  # not all models continue a state by several tokens at once
                lag = np.where(state["cached"] == 0, lag, 0)
            if lag.sum() < len(lag):
                return
            if rows.cache.recurrent:  # padding would enter the states: only rows of the same width
                width = int(lag.max())
                slots = np.flatnonzero(lag == width)[: max(1, _MAX_PREFILL_TOKENS // width)]
            else:
                width = min(int(lag.max()), _MAX_PREFILL_TOKENS)
                slots = np.flatnonzero(2 * lag >= width)[: _MAX_PREFILL_TOKENS // width]
            self._forward(rows, slots, np.minimum(lag[slots], width))

    def decode(self, rows: RowTable) -> torch.Tensor:
        """Compute the next uncached token of every running sequence. Returns its logits, (N, V)."""
        with reading_shared_keys_once():
            return self._forward(rows, np.arange(rows.num_active), np.ones(rows.num_active, dtype=np.int64))

    def _forward(self, rows: RowTable, slots: np.ndarray, widths: np.ndarray) -> torch.Tensor:
        """Compute the next `widths` known tokens of `slots`. Returns the logits of the last one, (N, V)."""
        device, width = self.model.device, int(widths.max())
        # Shorter rows are padded on the left with copies of their first token and its position: all of them write the
        # same keys and values to the same place.
        offsets = np.maximum(np.arange(width) - (width - widths)[:, None], 0)
        columns = rows.state["cached"][slots][:, None] + offsets  # (N, width)
        length = int(columns.max()) + 1
        position_ids = torch.from_numpy(columns).to(device)
        rows.cache.select(slots, position_ids, length, begins=width > 1 and not rows.state["cached"][slots].any())
        arguments = {
            "attention_mask": self._attention_mask(rows.cache.masks(position_ids, length)),
            "position_ids": position_ids,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(
            **_inputs(rows.tokens[slots[:, None], columns], self.model, self.images),
            **{self._cache_name: rows.cache},
            **{name: value for name, value in arguments.items() if name in self._parameters},
        )
        rows.cache.store()
        rows.state["cached"][slots] += widths
        self.stats.forwards += 1
        return output.logits[:, -1]

    def _attention_mask(self, masks: dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """Convert the masks to what the model expects: one mask for all layers, or one per kind of layer by name."""
        if self._attention != "sdpa":
            lowest = torch.finfo(self.model.dtype).min
            masks = {
                name: torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
                for name, mask in masks.items()
            }
        if len(masks) > 1:
            return {**masks, "linear_attention": None, "conv": None}
        return next(iter(masks.values()), None)
