"""Forward passes over the sequences of a [`RowTable`]: with a cache where that has rows, or without one."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .row_cache import STATES, RowCache, layer_kinds
from .row_table import RowTable


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)
# Tokens of one prefill forward, padding included; bounds its activations and its mask.
_MAX_PREFILL_TOKENS = 8192


def forward_pass(model: PreTrainedModel) -> CachedForward | PlainForward:
    """How sequences of this model are computed. Raises `ValueError` for models that continue no text."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"model: {type(model).__name__} is no causal language model, and TransformersEngine only continues text. "
            "Load one with AutoModelForCausalLM."
        )
    taken = _forward_arguments(model)
    cache = next((name for name in ("past_key_values", "cache_params") if name in taken), None)
    if cache is not None and _has_rows(model):
        return CachedForward(model, taken, cache)
    logger.warning(
        "model: the cache of %r cannot be shared out over rows, so TransformersEngine computes the whole "
        "sequence for each token. A vLLM engine is much faster.",
        model.config.model_type,
    )
    return PlainForward(model, taken)


def _has_rows(model: Any) -> bool:
    """Whether each sequence of a batch can be at a position of its own."""
    kinds = layer_kinds(model.config)
    if kinds is None or not model._supports_default_dynamic_cache():
        return False
    if any(kind.name == STATES for kind in kinds):
        return True
    # To these models `generate` gives prepared masks, too. Others may read positions off two-dimensional ones (ALiBi).
    return model._supports_attention_backend and model._can_compile_fullgraph


def _forward_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Names that the model's `forward` takes; PEFT's passes on whatever it is given."""
    base = cast("PeftModel", model).get_base_model() if is_peft_model(model) else model
    return frozenset(inspect.signature(base.forward).parameters)


class PlainForward:
    """
    Computes whole sequences, padded on the right, for each token: whatever a causal model keeps of a sequence, it
    depends on nothing that follows.
    """

    def __init__(self, model: PreTrainedModel, taken: frozenset[str]):
        self.model = model
        self._taken = taken
        self.forwards = 0

    def new_cache(self) -> RowCache:
        return RowCache()

    def prefill(self, rows: RowTable) -> None:
        """Nothing is computed ahead."""
        state = rows.state[: rows.num_active]
        state["cached"] = state["known"] - 1

    def decode(self, rows: RowTable) -> torch.Tensor:
        """Logits of the last token of every running sequence, (N, V)."""
        known = rows.state["known"][: rows.num_active]
        at_once = max(1, _MAX_PREFILL_TOKENS // int(known.max()))
        parts = [self._forward(rows, slice(start, start + at_once)) for start in range(0, rows.num_active, at_once)]
        rows.state["cached"][: rows.num_active] = known
        return torch.cat(parts)

    def _forward(self, rows: RowTable, part: slice) -> torch.Tensor:
        known = rows.state["known"][: rows.num_active][part]
        positions, place = np.unique(known - 1, return_inverse=True)
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(rows.tokens[: rows.num_active][part, : known.max()]).to(self.model.device),
            "use_cache": False,
        }
        if "logits_to_keep" in self._taken:
            arguments["logits_to_keep"] = torch.from_numpy(positions).to(self.model.device)
        else:
            place = known - 1
        self.forwards += 1
        return self.model(**arguments).logits[torch.arange(len(known)), torch.from_numpy(place)]


class CachedForward:
    """Computes the tokens that are not in the [`RowCache`] yet."""

    def __init__(self, model: PreTrainedModel, taken: frozenset[str], cache: str):
        self.model = model
        self._taken = taken
        self._cache = cache
        self._attention = model.config._attn_implementation
        self.forwards = 0
        if self.new_cache().masks(torch.zeros(1, 1, dtype=torch.long), 1) and self._attention not in ("sdpa", "eager"):
            raise ValueError(
                f"model: attention implementation {self._attention!r} is not supported by TransformersEngine. Load "
                "the model with attn_implementation='sdpa', or use a vLLM engine."
            )

    def new_cache(self) -> RowCache:
        return RowCache(self.model.config)

    def prefill(self, rows: RowTable) -> None:
        """
        Compute prompts up to their last token in forwards of their own, as long as that pays.

        A row that lacks `lag` tokens can also catch up in the common forwards, one token each, and wait for `lag` of
        them; a forward of its own lets every row wait for one.
        """
        state = rows.state[: rows.num_active]
        while True:
            lag = state["known"] - 1 - state["cached"]
            if rows.cache.recurrent:  # not all models read several tokens from a state on
                lag = np.where(state["cached"] == 0, lag, 0)
            if lag.sum() < len(lag):
                return
            if rows.cache.recurrent:  # whose states would take in padding: rows of the same width, read at once
                width = int(lag.max())
                slots = np.flatnonzero(lag == width)[: max(1, _MAX_PREFILL_TOKENS // width)]
            else:
                width = min(int(lag.max()), _MAX_PREFILL_TOKENS)
                slots = np.flatnonzero(2 * lag >= width)[: _MAX_PREFILL_TOKENS // width]
            self._forward(rows, slots, np.minimum(lag[slots], width))

    def decode(self, rows: RowTable) -> torch.Tensor:
        """Logits of the next token that is in no cache, of every running sequence, (N, V)."""
        return self._forward(rows, np.arange(rows.num_active), np.ones(rows.num_active, dtype=np.int64))

    def _forward(self, rows: RowTable, slots: np.ndarray, widths: np.ndarray) -> torch.Tensor:
        """Feed the next `widths` known tokens of `slots` to the model. Returns the logits of the last one, (N, V)."""
        device, width = self.model.device, int(widths.max())
        # Shorter rows are padded on the left with copies of their first token, at its position: all of them write the
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
            input_ids=torch.from_numpy(rows.tokens[slots[:, None], columns]).to(device),
            **{self._cache: rows.cache},
            **{name: value for name, value in arguments.items() if name in self._taken},
        )
        rows.cache.store()
        rows.state["cached"][slots] += widths
        self.forwards += 1
        return output.logits[:, -1]

    def _attention_mask(self, masks: dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor | None] | None:
        """As the model takes them: one for all of its layers, or those of several kinds of layers by their names."""
        if self._attention != "sdpa":
            lowest = torch.finfo(self.model.dtype).min
            masks = {
                name: torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
                for name, mask in masks.items()
            }
        if len(masks) > 1:
            return {**masks, "linear_attention": None, "conv": None}
        return next(iter(masks.values()), None)
