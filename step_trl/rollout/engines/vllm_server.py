"""
Engine over vLLM servers: token ids in, token ids and log-probabilities out, via `/v1/completions`. Prompts with images
go to `/inference/v1/generate`, which takes both token ids and images.

A plain call is one request, and the server checks its stop strings. A call with an `abandon` rule is streamed. Calls
with `ahead` share one streamed request whose stop strings are checked here, so that a thought that continues beside
its probes is not sent again. Each call ends at the token that completes a stop string, by the bytes of the tokens.

Start a server with `step-trl serve MODEL`. [`VLLMServerEngine.check`] says what is wrong with any other server.
"""

from __future__ import annotations

import copy
import ssl
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..event_loop import gather
from .base import AbandonRule, Engine, Generation, PromptImages, check_call
from .served_images import TOKENS_PATH, ServedImages, no_images
from .stop_strings import StopStrings
from .vllm_answers import Sampled, SampledAhead, read_choice, read_logprob, read_pieces
from .vllm_checks import ServerChecks, image_prompt
from .vllm_http import ConnectionLostError, EngineError, NotFoundError, Server, VLLMHTTPClient
from .vllm_process import LOOPBACK_HOSTS, command_line, has_gpu, server_command
from .vllm_weights import ServerWeights


_T = TypeVar("_T")
# Sent with every call, because the server takes other parameters from the model's generation config.
_FIXED_PARAMETERS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": False,  # a stop string such as "</think>" may be a special token
    "spaces_between_special_tokens": False,
    "logprobs": 0,  # of the sampled token only
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,  # the server need not decode each token
}


class VLLMServerEngine(Engine):
    """
    Samples on one or several vLLM servers.

    With several servers, a rollout goes to one that its prompt's tokens choose: completions of one prompt share a
    prefix cache, and all processes of a distributed training agree.

    If a server does not answer, the call is repeated from its prompt until `retry_window` is over. No other server
    takes it over, because that server may have other weights. Cancelling a call closes its connection, and the server
    aborts the request. The engine may be used in successive event loops. Its connections end with the loop.

    Args:
        base_url (`str` or `Sequence[str]`):
            URL of each server, such as `"http://127.0.0.1:8000"`, with or without `/v1`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy. It maps stop strings to tokens, and its EOS token ends a call.
        model (`str`, *optional*):
            Name of the model on the server, by default the one that it was started with.
        api_key (`str`, *optional*):
            API key of the server. It is never displayed.
        verify (`bool`, `str` or `ssl.SSLContext`, *optional*, defaults to `True`):
            For https: whether to verify certificates, or a file of trusted authorities, or a context.
        connect_timeout (`float`, defaults to `10.0`), read_timeout (`float`, defaults to `3600.0`):
            Maximum number of seconds to connect, and without data from the server. A plain call is answered only when
            it is complete, and may be queued before it starts.
        retry_window (`float`, *optional*, defaults to `300.0`):
            Seconds from the first failure of a call until it is given up.
        max_connections (`int`, *optional*, defaults to `512`):
            Maximum number of concurrent requests. Further calls wait. With `ahead`, half as many rollouts run, because
            each of them may have a probe beside its thought.
        stream_interval (`int`, *optional*, defaults to `4`), ahead_interval (`int`, *optional*, defaults to `16`):
            Tokens per piece of a call with an `abandon` rule (after the first token, which is sent at once), and of
            calls with `ahead`. Longer pieces cost less, but are read later.
        sample_ahead (`bool`, *optional*, defaults to `True`):
            Use `ahead`. Otherwise every call is a separate request with its own seed, and seeded rollouts are the same
            with and without speculation.
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
            raise ValueError("base_url: is empty. Pass for example 'http://127.0.0.1:8000'.")
        for name, interval in (("stream_interval", stream_interval), ("ahead_interval", ahead_interval)):
            if interval < 1:
                raise ValueError(f"{name}: {interval} is not a number of tokens. Set it to 1 or more.")
        if max_connections < 2:
            raise ValueError(
                f"max_connections: {max_connections} leaves none for a probe beside its thought. Set it to 2 or more."
            )
        self.model = model
        self.max_length = sys.maxsize  # of a prompt and its completion together, once `check` knows
        self.served_models: list[str] = []  # names of the model on the server, once `check` knows
        self.stream_interval = stream_interval
        self.ahead_interval = ahead_interval
        self.sample_ahead = sample_ahead
        self.tokenizer = tokenizer
        self._servers = tuple(Server(_clean_url(url)) for url in urls)
        # The additional id stands for those that the model has and the tokenizer lacks.
        vocab_size = max(tokenizer.get_vocab().values()) + 2
        self._stop_strings = StopStrings(tokenizer, vocab_size)
        self._images = ServedImages(vocab_size)
        self._ahead: SampledAhead | None = None
        self._client = VLLMHTTPClient(
            api_key=api_key,
            verify=verify,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            retry_window=retry_window,
            max_connections=max_connections,
            remedy=partial(_remedy, model),
        )
        self._weights = ServerWeights(self._client)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[server.url for server in self._servers]}, model={self.model!r})"

    def with_images(self, prompts: Sequence[Sequence[int]], images: PromptImages) -> list[list[int]]:
        """Return prompts with an id for each image, see [`Engine.with_images`]. The server processes the images."""
        return self._images.encode(prompts, images)

    @asynccontextmanager
    async def for_rollout(self, prompt_ids: Sequence[int]) -> AsyncIterator[VLLMServerEngine]:
        """Yield the engine on the one server that serves all completions of this prompt."""
        engine = self._on(self._server_of(prompt_ids))
        if not self.sample_ahead:
            yield engine
            return
        streams = await self._client.streams()
        engine._ahead = SampledAhead(self._stop_strings, self.tokenizer.eos_token_id, streams)
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
        body = self._body(prompt_ids, max_tokens, temperature)
        body |= {"stop": list(stop), "top_p": top_p, "top_k": top_k, "min_p": min_p}
        if seed is not None:
            body["seed"] = seed % 2**63
        server = self._server_of(prompt_ids)

        attempt = partial(self._answer, server, body, stop_set)
        if ahead and self._ahead is not None:
            attempt = partial(self._continue_stream, server, body, stop_set, self._ahead, abandon)
        elif abandon is not None:
            attempt = partial(self._until_abandoned, server, body, stop_set, abandon)
        return await self._with_weights(server, attempt)

    async def logprobs_of(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """
        See [`Engine.logprobs_of`]. Each token is a request of its own: the server's prefix cache serves these, but
        none that asks for the log-probabilities of its prompt.
        """
        check_call(prompt_ids, len(token_ids), (), 1.0)
        server = self._server_of(prompt_ids)

        def logprob_of(place: int) -> Awaitable[float]:
            body = self._body([*prompt_ids, *token_ids[:place]], 1)
            body |= {"logprobs": 1, "logprob_token_ids": [token_ids[place]]}
            return self._with_weights(server, partial(self._logprob, server, body, token_ids[place]))

        return await gather(map(logprob_of, range(len(token_ids))))

    def _body(self, prompt_ids: Sequence[int], max_tokens: int, temperature: float = 1.0) -> dict[str, Any]:
        """Return a request without stop strings and without restrictions of the distribution."""
        body = _FIXED_PARAMETERS | {
            "prompt": prompt_ids,
            "max_tokens": max_tokens,
            "stop": [],
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
        }
        if self.tokenizer.eos_token_id is not None:
            body["stop_token_ids"] = [self.tokenizer.eos_token_id]
        if self.model is not None:
            body["model"] = self.model
        return body

    async def _with_weights(self, server: Server, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Make a call, again if it fails, and first restore the weights of a server that may have restarted."""

        async def attempt_with_weights() -> _T:
            await self._weights.restore(server)
            return await attempt()

        return await self._client.retrying(server, attempt_with_weights)

    async def _logprob(self, server: Server, body: dict[str, Any], token_id: int) -> float:
        async with self._sampling_request(server, body) as response:
            logprob = read_logprob(await response.read(), token_id)
        if logprob is None:
            raise EngineError(
                f"logprob_token_ids: {server.url} does not return the log-probabilities of given tokens. Start it "
                "with a version of vLLM that does, such as 0.31."
            )
        return logprob

    async def _answer(self, server: Server, body: dict[str, Any], stop_set: int) -> Generation:
        sampled = Sampled(self._stop_strings, stop_set)
        async with self._sampling_request(server, body) as response:
            generation = sampled.add(read_choice(await response.read(), self.tokenizer.eos_token_id))
        if generation is None:
            raise ConnectionLostError("an incomplete answer")
        return generation

    async def _until_abandoned(
        self, server: Server, body: dict[str, Any], stop_set: int, abandon: AbandonRule
    ) -> Generation:
        sampled, generation = Sampled(self._stop_strings, stop_set), None
        options = {"stream": True, "stream_interval": self.stream_interval}
        async with (
            self._sampling_request(server, body | options) as response,
            aclosing(read_pieces(response, self.tokenizer.eos_token_id)) as pieces,
        ):
            async for piece in pieces:
                generation = sampled.add(piece)
                if generation is None and abandon(sampled.token_ids, sampled.logprobs):
                    return Generation(sampled.token_ids, sampled.logprobs, "abandoned")
        if generation is None:
            raise ConnectionLostError("a stream that broke off")
        return generation

    async def _continue_stream(
        self,
        server: Server,
        body: dict[str, Any],
        stop_set: int,
        ahead: SampledAhead,
        abandon: AbandonRule | None,
    ) -> Generation:
        """Take the next tokens of the rollout's stream, or of a new one if this call does not continue it."""
        opened = ahead.opened if ahead.continues(body) else None
        try:
            if opened is None:
                await ahead.close()
                options = {"stream": True, "stream_interval": self.ahead_interval, "stop": []}
                await ahead.open(self._sampling_request(server, body | options), body)
            return await ahead.take(stop_set, body["max_tokens"], abandon)
        except BaseException as error:
            await ahead.close()
            if opened is not None and isinstance(error, (aiohttp.ClientError, ConnectionLostError)):
                raise ConnectionLostError(f"{type(error).__name__}: {error}", opened) from error
            raise

    @asynccontextmanager
    async def _sampling_request(self, server: Server, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send the request for a completion, or for tokens if its prompt has images."""
        with_images = self._images.request(body)
        path = "/v1/completions" if with_images is None else TOKENS_PATH
        try:
            async with self._client.request(server, "POST", path, with_images or body) as response:
                yield response
        except NotFoundError as error:
            raise error if with_images is None else no_images(server, error) from None

    async def load_weights(self, folder: str | Path) -> None:
        """
        Make every server load the safetensors files of a folder that it can read, and reset its prefix cache.

        No call may be running. After an outage a server loads them again before its next call, unless it is still the
        same process.
        """
        await self._weights.load(self._servers, folder)

    async def forget_images(self) -> None:
        """Make every server forget the features of images, which belong to earlier weights. No call may be running."""
        await self._weights.forget_images(self._servers)

    async def check(
        self,
        max_length: int | None = None,
        *,
        policy_config: PretrainedConfig | None = None,
        weight_sync: str | None = None,
    ) -> None:
        """
        Check that every server suits rollouts. Call this once, before the first rollout.

        Args:
            max_length (`int`, *optional*):
                Maximum number of tokens of a prompt and its completion together.
            policy_config ([`~transformers.PretrainedConfig`], *optional*):
                Configuration of the policy, whose size must be that of the served model.
            weight_sync (`"nccl"` or `"disk"`, *optional*):
                How the server receives the policy's weights. By default it keeps its own.

        Raises:
            [`EngineError`]: names the first mistake and the option to set.
        """
        await self.health()
        for server in self._servers:
            checks = ServerChecks(server, self._client)
            served = await checks.model(self.model, max_length, policy_config)
            self.served_models, self.max_length = served.names, min(served.max_length, self.max_length)
            if weight_sync is not None:
                await checks.weight_sync(weight_sync)
            await checks.tokenizer(self.tokenizer)
            await checks.logprobs(self._on(server))
            await checks.prefix_cache()

    async def health(self) -> None:
        """Return once every server answers. Raises [`EngineUnavailableError`] if one does not."""
        for server in self._servers:
            await self._client.get(server, "/health")

    async def check_images(self, processor: ProcessorMixin) -> None:
        """
        Check that every server makes the same tokens of an image as the policy's `processor`.

        Raises:
            [`EngineError`]: names the difference and the remedy.
        """
        ours, images = image_prompt(processor)
        (prompt,) = self.with_images([ours], images)
        body = self._images.request({"prompt": prompt, "max_tokens": 1} | _FIXED_PARAMETERS)
        assert body is not None
        for server in self._servers:
            await ServerChecks(server, self._client).images(body | {"return_token_ids": True}, ours)

    def _on(self, server: Server) -> VLLMServerEngine:
        """Return the engine on one of its servers."""
        engine = copy.copy(self)
        engine._servers = (server,)
        return engine

    def _server_of(self, prompt_ids: Sequence[int]) -> Server:
        if len(self._servers) == 1:
            return self._servers[0]
        return self._servers[zlib.crc32(np.asarray(prompt_ids, dtype=np.int64).tobytes()) % len(self._servers)]


def _remedy(model: str | None, server: Server) -> str:
    """Describe how to start a server, for an error message."""
    address = urlsplit(server.url)
    cpu = address.hostname in LOOPBACK_HOSTS and not has_gpu()
    command, environment = server_command(model or "MODEL", port=address.port or 8000, cpu=cpu)
    command[0] = "python"  # of the server's machine
    return f"Start a server by `step-trl serve MODEL`, or by: {command_line(command, environment)}"


def _clean_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError("base_url: contains a user name or password. Set `api_key` instead.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url: {url!r} is not an http or https URL. Pass for example 'http://127.0.0.1:8000'.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
