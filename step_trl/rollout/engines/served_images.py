"""Images in requests to vLLM servers: an id for each image of a prompt, and the requests that send them."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .base import PromptImages
from .vllm_http import EngineError, NotFoundError, Server


TOKENS_PATH = "/inference/v1/generate"
# The fields of a completion request that are not sampling parameters.
_REQUEST_FIELDS = ("model", "stream")
_COMPLETIONS_ONLY = ("prompt", "return_token_ids", "return_tokens_as_token_ids", "stream_interval")


class ServedImages:
    """
    The images that an engine sends to its servers.

    An image has one id in a prompt, from `first` on. It is derived from the image, so that all processes agree on it.
    The server turns the image into pixels and into as many image tokens as the model's processor does.

    Args:
        first (`int`):
            The first id that is not a token's.
    """

    def __init__(self, first: int):
        self._first = first
        self._parts: dict[int, dict[str, str]] = {}
        self._token_id = -1

    def encode(self, prompts: Sequence[Sequence[int]], images: PromptImages) -> list[list[int]]:
        """
        Return prompts in which all tokens of an image are replaced by its id. Images of earlier calls are forgotten.

        Raises:
            `ValueError`: If it cannot be told which tokens belong to which image.
        """
        self._parts, self._token_id = {}, images.token_id
        return [
            _replace_runs(prompt, images.token_id, [self._id_of(image) for image in of_prompt or ()])
            for prompt, of_prompt in zip(prompts, images.images, strict=True)
        ]

    def request(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Return the request for tokens in place of one for a completion, or `None` if its prompt has no images."""
        if not self._parts:
            return None
        parts = [self._parts[id_] for id_ in body["prompt"] if id_ in self._parts]
        if not parts:
            return None
        sampling = {name: value for name, value in body.items() if name not in (*_REQUEST_FIELDS, *_COMPLETIONS_ONLY)}
        return {
            "token_ids": [self._token_id if id_ in self._parts else id_ for id_ in body["prompt"]],
            "content_parts": parts,
            "sampling_params": sampling,
            **{name: body[name] for name in _REQUEST_FIELDS if name in body},
        }

    def _id_of(self, image: Any) -> int:
        key = hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes(), digest_size=16)
        id_ = self._first + int.from_bytes(key.digest()[:6], "big")
        if id_ not in self._parts:
            file = io.BytesIO()
            image.save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            self._parts[id_] = {"type": "image_url", "url": url, "uuid": key.hexdigest()}
        return id_


def no_images(server: Server, error: NotFoundError) -> EngineError:
    """Return the error about a server without the endpoint for images."""
    return EngineError(
        f"images: {server.url} lacks {TOKENS_PATH} ({error}). From vLLM 0.30 on, start it with --enable-scale-out, as "
        "`step-trl serve` does."
    )


def _replace_runs(prompt: Sequence[int], token_id: int, ids: list[int]) -> list[int]:
    """Replace runs of image tokens by ids. A run is one image, or as many of equal size as there are ids."""
    runs = [(is_image, list(run)) for is_image, run in groupby(prompt, lambda id_: id_ == token_id)]
    lengths = [len(run) for is_image, run in runs if is_image]
    if not (len(lengths) == len(ids) or (len(lengths) == 1 and ids and lengths[0] % len(ids) == 0)):
        raise ValueError(
            f"images: a prompt has {len(ids)} images and {len(lengths)} runs of image tokens, of {lengths} tokens, so "
            "it cannot be told which belong to which. Put text between the images in the chat template."
        )
    waiting = iter(ids)
    each = len(ids) // max(1, len(lengths))
    return [id_ for is_image, run in runs for id_ in ([next(waiting) for _ in range(each)] if is_image else run)]
