"""
In-process engine: continuous batching over a transformers model.

Each step runs one forward pass over all running requests, one token each. A request occupies a slot of a [`RowCache`].
Slots of finished requests remain as a prefix cache: a request that extends an earlier sequence (a probe, the
continuation of a thought, another completion of the same prompt) computes only its new tokens.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base import (
    SETTLING_TURNS,
    AbandonRule,
    Engine,
    Generation,
    PromptImages,
    check_call,
    check_length,
    let_others_run,
)
from .image_tokens import ImageTokens
from .model_runner import make_model_runner
from .row_table import RowTable
from .scheduler import EngineStats, Request, Scheduler
from .stop_strings import StopStrings


class TransformersEngine(Engine):
    """
    Samples from a transformers model in this process. Concurrent calls are batched.

    Supports every causal language model that [`~transformers.GenerationMixin.generate`] supports, PEFT models
    included, on the model's device, in its precision and under the current autocast. The model is in eval mode while
    calls are running.

    - Full attention, sliding windows (Gemma 2 and 3, GPT-OSS, Cohere2) and chunks (Llama 4): cached prefixes are not
      computed again. Keys and values are kept for all positions, also those outside a window.
    - Layers with a state instead of keys and values (Qwen3-Next, LFM2, Mamba): a prefix can be reused only up to the
      end of a sequence, not from its middle.
    - Other caches: every token computes its whole sequence, and a warning says so.

    Prompts may have images, see [`TransformersEngine.with_images`].

    The cache belongs to the weights that computed it: call [`TransformersEngine.drop_prefix_cache`] whenever the
    weights change.

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Model to sample from, and its tokenizer.
        max_batch_size (`int`, *optional*, defaults to `128`):
            Maximum number of running calls. Further calls wait in order of arrival.
        max_rows (`int`, *optional*):
            Maximum number of cached sequences of running and finished calls together, by default twice
            `max_batch_size`. Memory grows as needed, for all rows at the length of the longest.
        eos_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a call, by default those of the model's generation config and of the tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_batch_size: int = 128,
        max_rows: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size: {max_batch_size} is not a batch size. Set it to 1 or more.")
        if max_rows is not None and max_rows < max_batch_size:
            raise ValueError(
                f"max_rows: {max_rows} rows cannot hold max_batch_size={max_batch_size} running calls. "
                "Set it to max_batch_size or more."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self._images = ImageTokens(model)
        self._runner = make_model_runner(model, self.stats, self._images)
        config = model.config.get_text_config(decoder=True)
        # Models without position embeddings need not set a maximum.
        self._max_length: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self._stop_strings = StopStrings(tokenizer, config.vocab_size)
        eos = np.zeros(config.vocab_size, dtype=bool)
        eos[_eos_token_ids(model, tokenizer) if eos_token_ids is None else list(eos_token_ids)] = True
        self._rows = RowTable(self._runner.new_cache, max_rows or 2 * max_batch_size, self._max_length)
        self._scheduler = Scheduler(self._rows, max_batch_size, self._stop_strings, eos, self.stats)
        self._worker: asyncio.Task[None] | None = None

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        abandon: AbandonRule | None = None,
        ahead: bool = False,
    ) -> Generation:
        """Without a `seed`, one is drawn from torch's global generator. Otherwise see [`Engine.generate`]."""
        check_call(prompt_ids, max_tokens, stop, temperature)
        check_length(len(prompt_ids), max_tokens, self._max_length, "the model's max_position_embeddings")
        request = Request(
            prompt=np.asarray(prompt_ids, dtype=np.int64),
            max_tokens=max_tokens,
            stop=self._stop_strings.index(stop),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=(int(torch.randint(2**62, ())) if seed is None else seed) % 2**64,
            abandon=abandon,
            future=asyncio.get_running_loop().create_future(),
        )
        return await self._answer(request)

    async def logprobs_of(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        check_call(prompt_ids, len(token_ids), (), 1.0)
        check_length(len(prompt_ids), len(token_ids), self._max_length, "the model's max_position_embeddings")
        request = Request(
            prompt=np.asarray(prompt_ids, dtype=np.int64),
            max_tokens=len(token_ids),
            stop=self._stop_strings.index(()),
            future=asyncio.get_running_loop().create_future(),
            forced=np.asarray(token_ids, dtype=np.int64),
        )
        return (await self._answer(request)).logprobs

    async def _answer(self, request: Request) -> Generation:
        """Wait until a request is finished, and start the worker if it is the only one."""
        worker = self._worker
        if worker is not None and (worker.done() or worker.get_loop() is not asyncio.get_running_loop()):
            self._abort()  # the worker's event loop ended early
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        self._scheduler.waiting.append(request)
        return await request.future

    def drop_prefix_cache(self) -> None:
        """Clear the cache and free its memory. Call this whenever the weights have changed."""
        self._scheduler.release_cancelled()
        if self._rows.num_active:
            raise RuntimeError(
                f"drop_prefix_cache: {self._rows.num_active} calls are running. Await or cancel them first."
            )
        self._rows.clear()
        self._images.clear()

    def with_images(self, prompts: Sequence[Sequence[int]], images: PromptImages) -> list[list[int]]:
        """
        Return prompts for this engine in which the patches of images have ids of their own.

        They are valid until the prefix cache is dropped. Without `pixel_values` among the images' fields, the prompts
        do not change. A model that does more with images than to embed them in the places of image tokens is refused.
        """
        with _evaluating(self.model):
            return self._images.encode(prompts, images.fields)

    async def _work(self) -> None:
        """Run steps while there are requests. The model returns to its own mode before the last caller wakes."""
        try:
            await let_others_run(SETTLING_TURNS)
            with _evaluating(self.model):
                while True:
                    # Leave the caller's inference mode: its tensors cannot be updated outside of it later.
                    with torch.inference_mode(False), torch.no_grad():
                        finished = self._step()
                    if not (self._scheduler.waiting or self._rows.num_active):
                        break
                    await let_others_run(SETTLING_TURNS if finished else 1)
        except Exception as error:
            self._abort(error)
        finally:
            self._abort()

    def _step(self) -> bool:
        """Prefill new requests and decode one token of every running one. Returns whether a request finished."""
        self._scheduler.release_cancelled()
        while self._scheduler.schedule():
            self._runner.prefill(self._rows)
        if not self._rows.num_active:
            return False
        return self._scheduler.postprocess(*self._rows.sample(self._runner.decode(self._rows)))

    def _abort(self, error: Exception | None = None) -> None:
        self._worker = None
        self._scheduler.abort(error)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return [id for id in {*ids, tokenizer.eos_token_id} if id is not None]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Disable dropout. Each module returns to its own mode, as parts of a training model may be in eval mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
