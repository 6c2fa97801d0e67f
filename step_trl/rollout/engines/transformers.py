"""
The engine that needs no server: continuous batching over a transformers model in this process.

Every tick runs one forward over all active rows, one token each. A row is a slot of a [`RowCache`]; slots of finished
calls stay behind as a prefix cache, so that a call whose prompt extends an earlier sequence (a probe, the continuation
of a thought, another completion of the same prompt) computes only what is new.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base import SETTLING_TURNS, AbandonRule, Engine, Generation, check_call, let_others_run
from .forward import forward_pass
from .row_table import RowTable
from .sampling import SamplingOptions, sample, uniforms
from .stop_strings import StopStrings


@dataclass
class EngineStats:
    """
    What an engine has done since it was made.

    Attributes:
        forwards (`int`):
            Calls of the model.
        prefilled_tokens (`int`):
            Prompt tokens that were computed.
        reused_tokens (`int`):
            Prompt tokens that were found in the cache.
        sampled_tokens (`int`):
            Tokens sampled.
    """

    forwards: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    sampled_tokens: int = 0


@dataclass(eq=False)
class _Call:
    """A call of `generate` on its way."""

    prompt: np.ndarray
    max_tokens: int
    stop: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    abandon: AbandonRule | None
    future: asyncio.Future[Generation]


class TransformersEngine(Engine):
    """
    Samples from a transformers model in this process; concurrent calls are batched between tokens.

    For every causal language model that [`~transformers.GenerationMixin.generate`] takes, also wrapped by PEFT, on the
    device, in the precision and under the autocast of the moment. The model is in eval mode while calls are running.

    - Full attention, sliding windows (Gemma 2 and 3, GPT-OSS, Cohere2) and chunks (Llama 4): a prefix that was
      computed before is not computed again. Keys and values are kept for all positions, also behind a window.
    - Layers with a state in place of keys and values (Qwen3-Next, LFM2, Mamba): a prefix can be reused up to where a
      sequence ended, not from the middle of it.
    - Other caches: whole sequences are computed for each token, and a warning says so.

    What is cached belongs to the weights that computed them: call [`TransformersEngine.drop_prefix_cache`]
    whenever the weights change.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Gives stop strings their tokens, and its EOS token ends a call.
        max_batch_size (`int`, *optional*, defaults to `128`):
            Most calls that run at once; further ones wait in order of arrival.
        max_rows (`int`, *optional*):
            Most sequences that are held in the cache, running and retained ones together; at least
            `max_batch_size`. Defaults to twice `max_batch_size`. Memory is taken as needed, for all rows at the length
            of the longest.
        eos_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a call. Defaults to those of the model's generation config and the tokenizer.
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
            raise ValueError(f"max_batch_size: {max_batch_size} is no batch. Set it to 1 or more.")
        if max_rows is not None and max_rows < max_batch_size:
            raise ValueError(
                f"max_rows: {max_rows} rows cannot hold max_batch_size={max_batch_size} running calls. "
                "Set it to max_batch_size or more."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.stats = EngineStats()
        self._forward = forward_pass(model)
        config = model.config.get_text_config(decoder=True)
        # Models without embeddings of positions need not say how many there are.
        self._max_length: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self._stop_strings = StopStrings(tokenizer, config.vocab_size)
        self._eos = np.zeros(config.vocab_size, dtype=bool)
        self._eos[_eos_token_ids(model, tokenizer) if eos_token_ids is None else list(eos_token_ids)] = True
        self._worker: asyncio.Task[None] | None = None
        self._waiting: deque[_Call] = deque()
        self._rows = RowTable(self._forward.new_cache, max_rows or 2 * max_batch_size, self._max_length)
        self._options: SamplingOptions | None = None  # of the active rows; None where they have changed

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
        """
        Sample a continuation of `prompt_ids`, as told in [`Engine.generate`].

        Without a `seed`, one is drawn from torch's global generator.
        """
        check_call(prompt_ids, max_tokens, stop, temperature)
        self._check_length(len(prompt_ids), max_tokens)
        call = _Call(
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
        worker = self._worker
        if worker is not None and (worker.done() or worker.get_loop() is not asyncio.get_running_loop()):
            self._abort()  # its loop ended before it did, or before it began
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        self._waiting.append(call)
        return await call.future

    def drop_prefix_cache(self) -> None:
        """Forget all that is cached and free its memory. To be called when the weights have changed."""
        self._release_cancelled()
        if self._rows.num_active:
            raise RuntimeError(
                f"drop_prefix_cache: {self._rows.num_active} calls are running. Await or cancel them first."
            )
        self._rows.clear()

    def _check_length(self, prompt_length: int, max_tokens: int) -> None:
        if prompt_length + max_tokens > self._max_length:
            raise ValueError(
                f"max_tokens: {max_tokens} after a prompt of {prompt_length} tokens exceeds the model's "
                f"max_position_embeddings of {self._max_length}. Set it to at most {self._max_length - prompt_length}."
            )

    async def _work(self) -> None:
        """Tick as long as there are calls. The model is back in its mode before the last caller wakes."""
        try:
            await let_others_run(SETTLING_TURNS)
            with _evaluating(self.model):
                while True:
                    # Not in inference mode, even if the caller is: its tensors cannot be updated outside of it later.
                    with torch.inference_mode(False), torch.no_grad():
                        ended = self._tick()
                    if not self._waiting and not self._rows.num_active:
                        break
                    await let_others_run(SETTLING_TURNS if ended else 1)
        except Exception as error:
            self._abort(error)
        finally:
            self._abort()

    def _abort(self, error: Exception | None = None) -> None:
        """End the worker and every call, with `error` or by cancelling them. After an orderly end there is none."""
        self._worker = None
        calls = [call for call in (*self._rows.calls, *self._waiting) if call is not None]
        for call in calls:
            if call.future.done() or call.future.get_loop().is_closed():
                continue
            if error is None:
                call.future.cancel()
            else:
                call.future.set_exception(error)
        if calls:
            self._waiting.clear()
            self._rows.clear()
            self._options = None

    def _tick(self) -> bool:
        """Admit waiting calls, read their prompts, decode one token of every running call. Whether a call ended."""
        rows = self._rows
        self._release_cancelled()
        while self._admit():
            rows.compact()
            self._forward.prefill(rows)
        rows.compact()
        if not rows.num_active:
            return False
        rows.reserve(int(rows.state["known"][: rows.num_active].max()) + 1)
        state = rows.state[: rows.num_active]
        if self._options is None:
            self._options = SamplingOptions.from_rows(state, self.model.device)
        random_numbers = torch.from_numpy(uniforms(state["seed"], state["known"] - state["start"]))
        logits = self._forward.decode(rows)
        self.stats.forwards = self._forward.forwards
        ids, logprobs = sample(logits, self._options, random_numbers.to(logits.device))
        return self._advance(ids.cpu().numpy(), logprobs.cpu().numpy())

    def _release_cancelled(self) -> None:
        for slot, call in enumerate(self._rows.calls):
            if call is not None and call.future.done():
                self._rows.release(slot)
                self._options = None

    def _admit(self) -> int:
        """Give waiting calls their slots, in order of arrival. Returns how many."""
        rows, admitted = self._rows, 0
        for call in tuple(self._waiting):
            if rows.num_active == self.max_batch_size:
                break
            if not call.future.done():
                source, shared, coming = rows.longest_prefix(call.prompt)
                if 2 * coming > len(call.prompt) - shared:
                    continue  # most of what it lacks is being computed for another call
                self._start(call, source, shared)
                admitted += 1
            self._waiting.remove(call)  # only now: a call is always found here or in the table, should memory run out
        return admitted

    def _start(self, call: _Call, source: int, shared: int) -> None:
        slot = self._rows.place(call, call.prompt, source, shared)
        state = self._rows.state[slot]
        state["limit"] = len(call.prompt) + call.max_tokens
        for name in ("stop", "temperature", "top_k", "top_p", "min_p", "seed"):
            state[name] = getattr(call, name)
        state["watched"] = call.abandon is not None
        self.stats.reused_tokens += shared
        self.stats.prefilled_tokens += len(call.prompt) - shared
        self._options = None

    def _advance(self, ids: np.ndarray, logprobs: np.ndarray) -> bool:
        """Append what was sampled and end the calls that are complete. Whether one ended."""
        rows = self._rows
        state = rows.state[: rows.num_active]
        slots = np.flatnonzero(state["cached"] == state["known"])  # the others are still reading their prompt
        ids, logprobs, position = ids[slots], logprobs[slots], state["known"][slots]
        if np.isnan(logprobs).any():
            raise RuntimeError("The model returned logits that are not finite. Check its weights and its precision.")
        rows.tokens[slots, position] = ids
        rows.logprobs[slots, position] = logprobs
        state["known"][slots] += 1
        self.stats.sampled_tokens += len(slots)
        may_end = self._eos[ids] | (position + 1 == state["limit"][slots]) | state["watched"][slots]
        may_end |= self._stop_strings.candidates[state["stop"][slots], ids]
        ended = False
        for slot in slots[may_end].tolist():
            ended |= self._end_if_complete(slot)
        return ended

    def _end_if_complete(self, slot: int) -> bool:
        rows = self._rows
        call, state = rows.calls[slot], rows.state[slot]
        if call.future.done():  # cancelled by another call's abandon rule
            return False
        sampled = slice(int(state["start"]), int(state["known"]))
        token_ids, logprobs = rows.tokens[slot, sampled].tolist(), rows.logprobs[slot, sampled].tolist()
        try:
            reason = self._finish_reason(call, token_ids, logprobs)
        except Exception as error:  # of the caller's abandon rule: the other calls go on
            call.future.set_exception(error)
        else:
            if reason is None:
                return False
            call.future.set_result(Generation(token_ids, logprobs, reason))
        rows.release(slot)
        self._options = None
        return True

    def _finish_reason(
        self, call: _Call, token_ids: list[int], logprobs: list[float]
    ) -> Literal["eos", "stop", "length", "abandoned"] | None:
        if self._eos[token_ids[-1]]:
            return "eos"
        if self._stop_strings.completed(call.stop, token_ids):
            return "stop"
        if len(token_ids) == call.max_tokens:
            return "length"
        if call.abandon is not None and call.abandon(token_ids, logprobs):
            return "abandoned"
        return None


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return [id for id in {*ids, tokenizer.eos_token_id} if id is not None]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout for the time. Each module gets its own mode back: parts of a training model may be in eval mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
