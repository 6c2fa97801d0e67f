"""Image patches as tokens with ids of their own, so that the in-process engine continues prompts with images."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from .adapters import without_adapter


_IMAGES_AT_ONCE = 64


def _tensor(values: Any) -> torch.Tensor:
    """Return a processor's values, one per image, as a tensor. Without `return_tensors`, they are a list of arrays."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.asarray(values))


class ImageTokens:
    """
    The patches of images that an engine has seen. Each has an id, from the size of the vocabulary on.

    Two images never share an id, and equal images do, so that prefixes are found and shared as those of text are.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A vision-language model that puts the features of an image in the places of its image tokens, such as
            LLaVA. Others are refused when they are given an image: models with positions in two dimensions (Qwen-VL),
            and models that attend to images in both directions (Gemma 3).
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.first: int = cast("Any", model.get_input_embeddings()).num_embeddings
        self.clear()

    def clear(self) -> None:
        """Forget all images: their features belong to weights that have changed."""
        self._ids: dict[bytes, range] = {}
        self._features: list[torch.Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def encode(self, prompts: Sequence[Sequence[int]], fields: Mapping[str, Any]) -> list[list[int]]:
        """
        Return prompts in which image tokens are replaced by the ids of the patches.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids, with an image token for each patch.
            fields (`Mapping[str, Any]`):
                What the processor returns beside the token ids: `pixel_values` `(images, ...)` of all images, in the
                order of the prompts, and tensors with one row per image.
        """
        if "pixel_values" not in fields:
            return [list(prompt) for prompt in prompts]
        image_token = self._check_model()
        patches = iter([id_ for image in self._encode_images(fields) for id_ in image])
        encoded = [[next(patches, -1) if id_ == image_token else id_ for id_ in prompt] for prompt in prompts]
        if next(patches, None) is not None or any(-1 in prompt for prompt in encoded):
            raise ValueError(
                "images: the prompts have not as many image tokens as the images have patches. Pass the processor's "
                "own token ids and pixel values, of the same prompts in the same order."
            )
        return encoded

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `(..., H)` of token ids, which may be patches."""
        embeddings = cast("Any", self.model.get_input_embeddings())(ids.clamp(max=self.first - 1))
        is_patch = ids >= self.first
        features = torch.cat(self._features)
        embeddings[is_patch] = features[ids[is_patch] - self.first].to(embeddings)
        return embeddings

    def _check_model(self) -> int:
        """Return the id of the image token, or raise an error if the model places images in another way."""
        base = without_adapter(self.model)
        parameters = inspect.signature(base.forward).parameters
        unlike = {"token_type_ids", "mm_token_type_ids", "image_grid_thw"} & parameters.keys()
        image_token = getattr(base.config, "image_token_id", None)
        if unlike or image_token is None or not hasattr(base, "get_image_features"):
            raise ValueError(
                f"images: TransformersEngine does not support those of {base.config.model_type!r}, whose images are "
                "not just embeddings in the places of image tokens. Use a model such as LLaVA, or TRL's generation: "
                "GRPO, or Step-GRPO with truncated_rollout=False."
            )
        return image_token

    def _encode_images(self, fields: Mapping[str, Any]) -> list[range]:
        pixels = _tensor(fields["pixel_values"])
        keys = [hashlib.blake2b(image.numpy().tobytes()).digest() for image in pixels.cpu()]
        new = list({key: place for place, key in enumerate(keys) if key not in self._ids}.values())
        for start in range(0, len(new), _IMAGES_AT_ONCE):
            places = new[start : start + _IMAGES_AT_ONCE]
            for place, features in zip(places, self._features_of(fields, places, len(pixels)), strict=True):
                self._ids[keys[place]] = range(self.first + self._count, self.first + self._count + len(features))
                self._features.append(features)
                self._count += len(features)
        return [self._ids[key] for key in keys]

    @torch.no_grad()
    def _features_of(self, fields: Mapping[str, Any], places: list[int], count: int) -> Sequence[torch.Tensor]:
        """Return the features `(patches, H)` of some of the images."""
        chosen = {
            name: _tensor(value)[places].to(self.model.device)
            for name, value in fields.items()
            if name in ("pixel_values", "image_sizes", "pixel_attention_mask") and len(value) == count
        }
        chosen["pixel_values"] = chosen["pixel_values"].to(self.model.dtype)
        features: Any = without_adapter(self.model).get_image_features
        return features(**chosen, return_dict=True).pooler_output
