"""
The engine over vLLM servers: token ids in, token ids and log-probabilities out, by `/v1/completions`.

A plain call is one request and one answer, and the server looks for the stop strings. A call with an `abandon` rule is
streamed. Calls with `ahead` share one streamed request, in which the stop strings are found here: a thought that goes
on beside its probes is not sent again. Each call ends at the token that completes a stop string, by the tokens' bytes.

Start a server with `step-trl serve MODEL`; [`VLLMServerEngine.check`] tells what is wrong with another one.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import re
import shlex
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from .base import AbandonRule, Engine, Generation, check_call
from .stop_strings import StopStrings
from .vllm_answers import Sampled, SampledAhead, read_choice, read_pieces
from .vllm_http import (
    ConnectionLostError,
    EngineError,
    EngineUnavailableError,
    NotFoundError,
    Server,
    VLLMHTTPClient,
)
from .vllm_process import LOOPBACK_HOSTS, NCCL_ARGUMENTS, command_line, has_gpu, server_command


__all__ = ["EngineError", "EngineUnavailableError", "VLLMServerEngine"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# Words, digits, spaces, other scripts and what ends a thought: tokenizers of different models differ on it.
_TOKENIZER_SAMPLE = "Wait, 12 + 345 = 357.\n\nAlternatively\n</think>  π≈3.14, 思考"
_PROCESSED_TOLERANCE = 1e-4
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")


class VLLMServerEngine(Engine):
    """
    Samples on one or several vLLM servers.

    With several servers, a rollout uses the one that [`VLLMServerEngine.for_rollout`] gives it, so that completions of
    one prompt share one server's prefix cache; [`DynamicTruncatedRollout`] does so. The server depends on the prompt's
    tokens alone, and every process of a distributed training agrees on it.

    A server that does not answer is tried again, the call from its prompt, until `retry_window` is over; no other
    server takes its calls over, as it may have other weights. Cancelling a call closes its connection, which makes the
    server abort it.

    The engine may be used from one event loop after another (`asyncio.run` once per batch); its connections end with
    the loop.

    Args:
        base_url (`str` or `Sequence[str]`):
            URL of each server, such as `"http://127.0.0.1:8000"`, with or without `/v1`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer: gives stop strings their tokens, and its EOS token ends a call.
        model (`str`, *optional*):
            Name of the model on the server, by default the one it was started with.
        api_key (`str`, *optional*):
            The server's API key.
        verify (`bool`, `str` or `ssl.SSLContext`, *optional*, defaults to `True`):
            For https: whether certificates are checked, or a file with the authorities to trust, or a context.
        connect_timeout (`float`, *optional*, defaults to `10.0`):
            Seconds to connect.
        read_timeout (`float`, *optional*, defaults to `3600.0`):
            Seconds without a byte from the server. A plain call is answered only when it is complete, and may wait for
            others before it begins.
        retry_window (`float`, *optional*, defaults to `300.0`):
            Seconds from the first failure of a call until it is given up.
        max_connections (`int`, *optional*, defaults to `512`):
            Most calls that are sent at once; further ones wait here. Of rollouts with `ahead`, half as many run at
            once, as each may have a probe beside its thought.
        stream_interval (`int`, *optional*, defaults to `4`):
            Tokens per piece of a call with an `abandon` rule; the first token always comes at once. More of them cost
            less, but `abandon` is asked later.
        ahead_interval (`int`, *optional*, defaults to `16`):
            Tokens per piece of calls with `ahead`. More of them cost less, but a stop string is seen later, and more
            tokens behind it are sampled in vain.
        sample_ahead (`bool`, *optional*, defaults to `True`):
            Heed `ahead`. Without it every call is a request of its own with its own seed, and seeded rollouts are the
            same whether they are speculative or pause.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str | None = None,
        api_key: str | None = None,
        verify: bool | str | ssl.SSLContext = True,
        connect_timeout: float = 10.0,
        read_timeout: float = 3600.0,
        retry_window: float = 300.0,
        max_connections: int = 512,
        stream_interval: int = 4,
        ahead_interval: int = 16,
        sample_ahead: bool = True,
    ):
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ValueError("base_url: is empty. Pass for instance 'http://127.0.0.1:8000'.")
        for name, interval in (("stream_interval", stream_interval), ("ahead_interval", ahead_interval)):
            if interval < 1:
                raise ValueError(f"{name}: {interval} is no number of tokens. Set it to 1 or more.")
        if max_connections < 2:
            raise ValueError(
                f"max_connections: {max_connections} leaves none for a probe beside its thought. Set it to 2 or more."
            )
        self.model = model
        self.stream_interval = stream_interval
        self.ahead_interval = ahead_interval
        self.sample_ahead = sample_ahead
        self.tokenizer = tokenizer
        self._servers = tuple(Server(_clean_url(url)) for url in urls)
        # One id more than the tokenizer has: it stands for those that only the model has.
        self._stop_strings = StopStrings(tokenizer, max(tokenizer.get_vocab().values()) + 2)
        self._ahead: SampledAhead | None = None
        self._restoring: dict[tuple[asyncio.AbstractEventLoop, Server], asyncio.Lock] = {}
        self._client = VLLMHTTPClient(
            api_key=api_key,
            verify=verify,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            retry_window=retry_window,
            max_connections=max_connections,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[server.url for server in self._servers]}, model={self.model!r})"

    @asynccontextmanager
    async def for_rollout(self, prompt_ids: Sequence[int]) -> AsyncIterator[VLLMServerEngine]:
        """The engine on the one server that serves all completions of a prompt, chosen by the prompt's tokens."""
        engine = copy.copy(self)
        engine._servers = (self._server_of(prompt_ids),)
        if not self.sample_ahead:
            yield engine
            return
        engine._ahead = SampledAhead(self._stop_strings, await self._client.streams())
        try:
            yield engine
        finally:
            await engine._ahead.end()

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
        check_call(prompt_ids, max_tokens, stop, temperature)
        stop_set = self._stop_strings.index(stop)
        body = self._request_body(
            prompt=prompt_ids,
            max_tokens=max_tokens,
            stop=list(stop),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
        )
        if seed is not None:
            body["seed"] = seed % 2**63
        server = self._server_of(prompt_ids)

        attempt = partial(self._answer, server, body, stop_set)
        if abandon is not None:
            attempt = partial(self._until_abandoned, server, body, stop_set, abandon)
        elif ahead and self._ahead is not None:
            attempt = partial(self._taken, server, body, stop_set, self._ahead)

        async def with_weights() -> Generation:
            if server.forgetful:
                await self._restore(server)
            return await attempt()

        return await self._retrying(server, with_weights)

    async def _answer(self, server: Server, body: dict[str, Any], stop_set: int) -> Generation:
        sampled = Sampled(self._stop_strings, stop_set)
        async with self._client.request(server, "POST", "/v1/completions", body) as response:
            generation = sampled.add(read_choice(await response.read()))
        if generation is None:
            raise ConnectionLostError("an answer that is not complete")
        return generation

    async def _until_abandoned(
        self, server: Server, body: dict[str, Any], stop_set: int, abandon: AbandonRule
    ) -> Generation:
        sampled, generation = Sampled(self._stop_strings, stop_set), None
        options = {"stream": True, "stream_interval": self.stream_interval}
        async with (
            self._client.request(server, "POST", "/v1/completions", body | options) as response,
            aclosing(read_pieces(response)) as pieces,
        ):
            async for piece in pieces:
                generation = sampled.add(piece)
                if generation is None and abandon(sampled.token_ids, sampled.logprobs):
                    return Generation(sampled.token_ids, sampled.logprobs, "abandoned")
        if generation is None:
            raise ConnectionLostError("a stream that broke off")
        return generation

    async def _taken(self, server: Server, body: dict[str, Any], stop_set: int, ahead: SampledAhead) -> Generation:
        """From the rollout's own stream, or from a new one where this call does not go on with it."""
        opened = ahead.opened if ahead.goes_on(body) else None
        try:
            if opened is None:
                await ahead.close()
                options = {"stream": True, "stream_interval": self.ahead_interval, "stop": []}
                request = self._client.request(server, "POST", "/v1/completions", body | options)
                await ahead.open(request, body)
            return await ahead.take(stop_set, body["max_tokens"])
        except BaseException as error:
            await ahead.close()
            if opened is not None and isinstance(error, (aiohttp.ClientError, ConnectionLostError)):
                raise ConnectionLostError(f"{type(error).__name__}: {error}", opened) from error
            raise

    def _request_body(self, **sampling: Any) -> dict[str, Any]:
        """All that shapes the distribution is given: the rest the server takes from the model's generation config."""
        body = {
            **sampling,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "skip_special_tokens": False,  # a stop string such as "</think>" may be a special token
            "spaces_between_special_tokens": False,
            "logprobs": 0,  # of the sampled token only
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # saves the server the text of each token
        }
        if self.tokenizer.eos_token_id is not None:
            body["stop_token_ids"] = [self.tokenizer.eos_token_id]
        if self.model is not None:
            body["model"] = self.model
        return body

    async def load_weights(self, folder: str | Path) -> None:
        """
        Let every server load new weights and forget its cached prefixes. To be called while no call is running.

        A server that did not answer for a while is told to load them again before it gets another call, unless it is
        still the same process.

        Args:
            folder (`str` or `Path`):
                Safetensors files, under a path that every server can read.
        """
        for server in self._servers:
            server.weights = str(folder)
        await asyncio.gather(*(self._retrying(server, partial(self._load, server)) for server in self._servers))

    async def _load(self, server: Server) -> None:
        started = await self._start_of(server)
        order = {"method": "reload_weights", "kwargs": {"weights_path": server.weights}}
        for path, body in (("/collective_rpc", order), ("/reset_prefix_cache", None)):
            try:
                async with self._client.request(server, "POST", path, body) as response:
                    await response.read()
            except EngineError as error:
                raise EngineError(
                    f"{error} Weights are loaded by endpoints that a server has only with VLLM_SERVER_DEV_MODE=1 in "
                    "its environment; `step-trl serve` sets it where the server listens on 127.0.0.1."
                ) from None
        server.started, server.forgetful = started, False

    async def _start_of(self, server: Server) -> str | None:
        """When the server's process was started, by the metrics that Prometheus' client adds to vLLM's own."""
        async with self._client.request(server, "GET", "/metrics") as response:
            found = re.search(r"^process_start_time_seconds (\S+)$", await response.text(), re.MULTILINE)
        return found[1] if found else None

    async def _restore(self, server: Server) -> None:
        """Load the weights again if the server is a new process, once for all calls that wait for it."""
        lock = self._restoring.setdefault((asyncio.get_running_loop(), server), asyncio.Lock())
        async with lock:
            if not server.forgetful:
                return
            if server.started is not None and await self._start_of(server) == server.started:
                server.forgetful = False
                return
            await self._load(server)
            logger.warning("%s may have been restarted and was told to load %s again", server.url, server.weights)

    async def check(
        self,
        max_length: int | None = None,
        *,
        policy_config: PretrainedConfig | None = None,
        weight_sync: str | None = None,
    ) -> None:
        """
        Check that every server is what rollouts need. To be called once, before the first of them.

        Args:
            max_length (`int`, *optional*):
                Tokens of the longest prompt and its completion together.
            policy_config ([`~transformers.PretrainedConfig`], *optional*):
                The policy's, to compare its size with that of the served model.
            weight_sync (`str`, *optional*):
                How the server is to receive the policy's weights, `"nccl"` or `"disk"`. By default it keeps its own.

        Raises:
            [`EngineError`]: names the first thing that is wrong, and what to set.
        """
        for server in self._servers:
            await self._get(server, "/health")
            await self._check_model(server, max_length, policy_config)
            if weight_sync is not None:
                await self._check_weight_sync(server, weight_sync)
            await self._check_tokenizer(server)
            await self._check_logprobs(server)
            await self._check_prefix_cache(server)

    async def _check_model(
        self, server: Server, max_length: int | None, policy_config: PretrainedConfig | None
    ) -> None:
        models = json.loads(await self._get(server, "/v1/models"))["data"]
        names = [model["id"] for model in models]
        if self.model is not None and self.model not in names:
            raise EngineError(
                f"model: {server.url} does not serve {self.model!r}, but {', '.join(map(repr, names))}. Set `model` "
                "to one of them, or start the server with --served-model-name."
            )
        longest = next((model["max_model_len"] for model in models if model.get("max_model_len")), None)
        if max_length is not None and longest is not None and longest < max_length:
            raise EngineError(
                f"max_length: prompt and completion need up to {max_length} tokens, {server.url} takes {longest}. "
                f"Start it with --max-model-len {max_length}, or shorten prompts or completions."
            )
        if policy_config is not None:
            self._check_size(server, models[0]["root"], policy_config)

    async def _check_weight_sync(self, server: Server, weight_sync: str) -> None:
        """By the server's own configuration."""
        try:
            config = json.loads(await self._get(server, "/server_info?config_format=json"))["vllm_config"]
        except NotFoundError:
            raise EngineError(
                f"weight_sync: {server.url} lacks the endpoints that receive weights. Start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment; `step-trl serve` sets it where the server listens on "
                "127.0.0.1."
            ) from None
        if weight_sync == "nccl" and config["weight_transfer_config"] is None:
            raise EngineError(
                f"weight_sync: {server.url} has no weight-transfer engine, which 'nccl' needs. Start it with "
                f"{shlex.join(NCCL_ARGUMENTS)}, as `step-trl serve` does on a GPU, or set weight_sync='disk'."
            )

    def _check_size(self, server: Server, name: str, policy_config: PretrainedConfig) -> None:
        try:
            served_config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError):  # a folder of another machine, or a model with code of its own
            logger.warning(
                "%s serves %r, whose configuration cannot be read here: its size is not compared with the policy's.",
                server.url,
                name,
            )
            return
        theirs, ours = (
            ", ".join(f"{size} {getattr(config.get_text_config(), size, None)}" for size in _SIZES)
            for config in (served_config, policy_config)
        )
        if theirs != ours:
            raise EngineError(
                f"model: {server.url} serves {name!r}, a model of another size than the policy: {theirs} instead of "
                f"{ours}. Serve the model that is trained."
            )

    async def _check_tokenizer(self, server: Server) -> None:
        ours = self.tokenizer.encode(_TOKENIZER_SAMPLE, add_special_tokens=False)
        question = {"prompt": _TOKENIZER_SAMPLE, "add_special_tokens": False}
        theirs = json.loads(await self._get(server, "/tokenize", question))["tokens"]
        if ours != theirs:
            raise EngineError(
                f"tokenizer: that of {server.url} is another one ({theirs[:8]}... instead of {ours[:8]}... for "
                f"{_TOKENIZER_SAMPLE[:20]!r}...). Serve the policy's model, or start the server with --tokenizer."
            )

    async def _check_logprobs(self, server: Server) -> None:
        """With top_k=1, a sampled token has probability 1 after processing, and its own before."""
        on_server = copy.copy(self)
        on_server._servers = (server,)
        for token_id in self.tokenizer.encode(_TOKENIZER_SAMPLE, add_special_tokens=False)[:4]:
            generation = await on_server.generate([token_id], max_tokens=1, top_k=1)
            if abs(generation.logprobs[0]) > _PROCESSED_TOLERANCE:
                raise EngineError(
                    f"logprobs: {server.url} returns {generation.logprobs[0]:.4f} for a token that was sampled with "
                    "probability 1: they are not those of the distribution that is sampled from. Start it with "
                    "--logprobs-mode processed_logprobs."
                )

    async def _check_prefix_cache(self, server: Server) -> None:
        if re.search(r'vllm:cache_config_info\{.*enable_prefix_caching="False"', await self._get(server, "/metrics")):
            logger.warning(
                "%s does not cache prefixes, so every probe and every completion reads its prompt anew. Start it with "
                "--enable-prefix-caching.",
                server.url,
            )

    async def _get(self, server: Server, path: str, body: dict[str, Any] | None = None) -> str:
        async def answer() -> str:
            async with self._client.request(server, "GET" if body is None else "POST", path, body) as response:
                return await response.text()

        return await self._retrying(server, answer)

    async def _retrying(self, server: Server, attempt: Callable[[], Awaitable[_T]]) -> _T:
        return await self._client.retrying(server, attempt, partial(self._remedy, server))

    def _remedy(self, server: Server) -> str:
        """How the server is started, for an error message."""
        address = urlsplit(server.url)
        cpu = address.hostname in LOOPBACK_HOSTS and not has_gpu()
        command, environment = server_command(self.model or "MODEL", port=address.port or 8000, cpu=cpu)
        command[0] = "python"  # of the server's machine
        return f"A server is started by `step-trl serve MODEL`, or by: {command_line(command, environment)}"

    def _server_of(self, prompt_ids: Sequence[int]) -> Server:
        if len(self._servers) == 1:
            return self._servers[0]
        return self._servers[zlib.crc32(np.asarray(prompt_ids, dtype=np.int64).tobytes()) % len(self._servers)]


def _clean_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError("base_url: holds a user name or password. Set `api_key` instead.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url: {url!r} is no http or https URL. Pass for instance 'http://127.0.0.1:8000'.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
