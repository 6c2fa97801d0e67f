"""Checks of a vLLM server, before the first rollout."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from PIL import Image
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .base import Engine, PromptImages
from .served_images import TOKENS_PATH, no_images
from .vllm_http import EngineError, NotFoundError, Server, VLLMHTTPClient
from .vllm_process import DEVELOPMENT_MODE, NCCL_ARGUMENTS


logger = logging.getLogger(__name__)

# Tokenizers of different models differ on this text.
_SAMPLE = "Wait, 12 + 345 = 357.\n\nAlternatively\n</think>  π≈3.14, 思考"
_PROCESSED_TOLERANCE = 1e-4
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


class ServedModel(NamedTuple):
    """The names of the model on a server, and the maximum number of tokens of a prompt and its completion."""

    names: list[str]
    max_length: int


@dataclass(frozen=True)
class ServerChecks:
    """
    Checks of one server. Each raises an [`EngineError`] that names the mistake and the option to set.

    Attributes:
        server ([`Server`]):
            The server.
        client ([`VLLMHTTPClient`]):
            The client that asks it.
    """

    server: Server
    client: VLLMHTTPClient

    async def model(
        self, name: str | None, max_length: int | None, policy_config: PretrainedConfig | None
    ) -> ServedModel:
        """Check that the server has the model with this name, for `max_length` tokens and of the policy's size."""
        models = json.loads(await self._get("/v1/models"))["data"]
        names = [model["id"] for model in models]
        if name is not None and name not in names:
            raise EngineError(
                f"model: {self.server.url} does not serve {name!r}, but {', '.join(map(repr, names))}. Set `model` "
                "to one of them, or start the server with --served-model-name."
            )
        longest = next((model["max_model_len"] for model in models if model.get("max_model_len")), sys.maxsize)
        if max_length is not None and longest < max_length:
            raise EngineError(
                f"max_length: prompt and completion need up to {max_length} tokens, {self.server.url} takes "
                f"{longest}. Start it with --max-model-len {max_length}, or shorten prompts or completions."
            )
        if policy_config is not None:
            self.size(models[0]["root"], policy_config)
        return ServedModel(names, longest)

    def size(self, served: str, policy_config: PretrainedConfig) -> None:
        """Compare the size of a served model with the policy's, if its configuration can be read here."""
        try:
            served_config = AutoConfig.from_pretrained(served)
        except (OSError, ValueError):  # a folder on another machine, or a model with custom code
            logger.warning(
                "%s serves %r, whose configuration cannot be read here: its size is not compared with the policy's.",
                self.server.url,
                served,
            )
            return
        theirs, ours = (
            ", ".join(f"{size} {getattr(config.get_text_config(), size, None)}" for size in _SIZES)
            for config in (served_config, policy_config)
        )
        if theirs != ours:
            raise EngineError(
                f"model: {self.server.url} serves {served!r}, a model of another size than the policy: {theirs} "
                f"instead of {ours}. Serve the trained model."
            )

    async def weight_sync(self, weight_sync: str) -> None:
        """Check that the server can receive weights by `"nccl"` or `"disk"`."""
        try:
            config = json.loads(await self._get("/server_info?config_format=json"))["vllm_config"]
        except NotFoundError:
            raise EngineError(
                f"weight_sync: {self.server.url} lacks the endpoints that receive weights. Start it with "
                f"{DEVELOPMENT_MODE}"
            ) from None
        if weight_sync == "nccl" and config["weight_transfer_config"] is None:
            raise EngineError(
                f"weight_sync: {self.server.url} has no weight-transfer engine, which 'nccl' needs. Start it with "
                f"{shlex.join(NCCL_ARGUMENTS)}, as `step-trl serve` does on a GPU, or set weight_sync='disk'."
            )

    async def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the server has the policy's tokenizer."""
        ours = tokenizer.encode(_SAMPLE, add_special_tokens=False)
        question = {"prompt": _SAMPLE, "add_special_tokens": False}
        theirs = json.loads(await self._get("/tokenize", question))["tokens"]
        if ours != theirs:
            raise EngineError(
                f"tokenizer: {self.server.url} has another tokenizer ({theirs[:8]}... instead of {ours[:8]}... for "
                f"{_SAMPLE[:20]!r}...). Serve the policy's model, or start the server with --tokenizer."
            )

    async def logprobs(self, engine: Engine) -> None:
        """Sample by `engine` on the server with top_k=1, where every token has probability 1 after processing."""
        for token_id in engine.tokenizer.encode(_SAMPLE, add_special_tokens=False)[:4]:
            generation = await engine.generate([token_id], max_tokens=1, top_k=1)
            if abs(generation.logprobs[0]) > _PROCESSED_TOLERANCE:
                raise EngineError(
                    f"logprobs: {self.server.url} returns {generation.logprobs[0]:.4f} for a token that was sampled "
                    "with probability 1, so its log-probabilities are not those of the sampled distribution. Start "
                    "it with --logprobs-mode processed_logprobs."
                )

    async def prefix_cache(self) -> None:
        """Warn about a server without a prefix cache."""
        if re.search(r'vllm:cache_config_info\{.*enable_prefix_caching="False"', await self._get("/metrics")):
            logger.warning(
                "%s does not cache prefixes, so every probe and completion computes its prompt again. Start it with "
                "--enable-prefix-caching.",
                self.server.url,
            )

    async def images(self, question: dict[str, Any], ours: Sequence[int]) -> None:
        """Check that the server makes of a request with an image the tokens `ours` of the policy's processor."""
        try:
            answer = await self._get(TOKENS_PATH, question)
        except NotFoundError as error:
            raise no_images(self.server, error) from None
        theirs = json.loads(answer)["prompt_token_ids"]
        if theirs != list(ours):
            raise EngineError(
                f"images: {self.server.url} makes {len(theirs)} tokens of a prompt with an image, and the policy's "
                f"processor {len(ours)}, or others. Serve the trained model with its processor's files."
            )

    async def _get(self, path: str, body: dict[str, Any] | None = None) -> str:
        return await self.client.get(self.server, path, body)


def image_prompt(processor: ProcessorMixin) -> tuple[list[int], PromptImages]:
    """Return the token ids of a prompt with an image, as the policy's processor makes them, and the image."""
    image = Image.new("RGB", (64, 48), "white")
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
    rendered: Any = cast("Any", processor).apply_chat_template(
        [[message]], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    (token_ids,) = rendered["input_ids"]
    return token_ids, PromptImages.of(processor, [[image]], rendered)
