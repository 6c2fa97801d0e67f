"""
The web application: an OpenAI-compatible API whose completions are truncated rollouts on a vLLM server.

A client that disconnects cancels its handler, which closes the requests to the vLLM server, which then aborts them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from aiohttp import web

from ..rollout import DynamicTruncatedRollout
from ..rollout.engines import EngineError, EngineUnavailableError, VLLMServerEngine
from ..rollout.event_loop import cancel
from .completions import Completions
from .errors import RequestError, error_body, shown
from .exits import ExitOptions
from .fields import read_body
from .prompts import Prompt, PromptReader
from .requests import ChatRequest, CompletionRequest, Sampling
from .responses import END_OF_STREAM, ResponseFormat, event
from .text import visible_pieces


logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_LARGEST_BODY = 16 * 2**20  # bytes
_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class EarlyExitEndpoint:
    """
    Serves `/v1/chat/completions`, `/v1/completions` and `/v1/models` with early exits.

    Args:
        engine ([`~step_trl.rollout.engines.VLLMServerEngine`]):
            The server, after [`~step_trl.rollout.engines.VLLMServerEngine.check`]. With a short `retry_window`,
            clients soon learn that it does not answer.
        exits ([`ExitOptions`]):
            When thoughts end, unless a request says otherwise.
        names (`Sequence[str]`, *optional*):
            Names of the model, by default those of the server.
        sampling_defaults (`Mapping[str, float]`, *optional*):
            `temperature`, `top_p`, `top_k` and `min_p` of requests that do not set them, otherwise OpenAI's.
        api_key (`str`, *optional*):
            Key that clients must send.

    Attributes:
        app (`aiohttp.web.Application`):
            The application. Run it with `handler_cancellation=True`.
    """

    def __init__(
        self,
        engine: VLLMServerEngine,
        exits: ExitOptions,
        *,
        names: Sequence[str] = (),
        sampling_defaults: Mapping[str, float] | None = None,
        api_key: str | None = None,
    ):
        self._engine = engine
        self._exits = exits
        self._names = list(dict.fromkeys([*names, *engine.served_models]))
        self._defaults = sampling_defaults or {}
        self._api_key = api_key
        self._prompts = PromptReader(engine.tokenizer, engine.max_length)
        self._pieces = visible_pieces(engine.tokenizer)
        # Builds the tables of triggers once. Requests replace its callbacks and its sampling.
        self._rollout = DynamicTruncatedRollout(engine, exits.callbacks(engine.tokenizer))
        self.app = web.Application(client_max_size=_LARGEST_BODY, middlewares=[self._answer_errors, self._authorize])
        self.app.router.add_post("/v1/chat/completions", self._chat)
        self.app.router.add_post("/v1/completions", self._complete)
        self.app.router.add_get("/v1/models", self._list_models)
        self.app.router.add_get("/v1/models/{name:.+}", self._show_model)
        self.app.router.add_get("/health", self._health)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = ChatRequest.read(read_body(await request.read()), self._exits, self._defaults)
        self._check_model(asked.sampling.model)
        prompt = self._prompts.chat(asked.messages, asked.template_options, asked.sampling)
        return await self._respond(request, "chat", [prompt], asked.sampling)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = CompletionRequest.read(read_body(await request.read()), self._exits, self._defaults)
        self._check_model(asked.sampling.model)
        prompts = [self._prompts.completion(prompt, asked.sampling) for prompt in asked.prompts]
        return await self._respond(request, "text", prompts, asked.sampling)

    async def _respond(
        self, request: web.Request, kind: Literal["chat", "text"], prompts: Sequence[Prompt], sampling: Sampling
    ) -> web.StreamResponse:
        completions = Completions(self._rollout, prompts, sampling, self._pieces, separate=kind == "chat")
        written = ResponseFormat(kind, sampling.model or self._names[0])
        if sampling.stream:
            return await self._stream(request, completions, written)
        await completions.run()
        return web.Response(body=written.whole(completions), content_type="application/json")

    async def _stream(
        self, request: web.Request, completions: Completions, written: ResponseFormat
    ) -> web.StreamResponse:
        """Write text as it comes. The response begins with it, so that an earlier error has a status of its own."""
        texts: asyncio.Queue[bytes | None] = asyncio.Queue()
        sampling = asyncio.ensure_future(completions.run(lambda *text: texts.put_nowait(written.further(*text))))
        sampling.add_done_callback(lambda _: texts.put_nowait(None))
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        try:
            if (text := await texts.get()) is None:
                await sampling  # raises its error
            await response.prepare(request)
            await response.write(written.opening(completions))
            while text is not None:
                ready = text
                while not texts.empty() and (text := texts.get_nowait()) is not None:
                    ready += text
                await response.write(ready)
                text = text and await texts.get()
            await response.write(await self._closing(sampling, completions, written))
        except ConnectionResetError:
            pass  # the client is gone
        finally:
            await cancel(sampling)
        return response

    async def _closing(
        self, sampling: asyncio.Future[None], completions: Completions, written: ResponseFormat
    ) -> bytes:
        """Return the last events of a stream: its usage if asked for, or the error that broke it off."""
        try:
            await sampling
        except Exception as error:
            message, status = self._describe(error)
            return event(error_body(message, status))
        usage = written.usage(completions) if completions.sampling.include_usage else b""
        return usage + END_OF_STREAM

    async def _list_models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._names]})

    async def _show_model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return _json(self._model(request.match_info["name"]))

    async def _health(self, request: web.Request) -> web.Response:
        await self._engine.health()
        return web.Response()

    def _model(self, name: str) -> dict[str, Any]:
        length = self._engine.max_length
        return {"id": name, "object": "model", "created": 0, "owned_by": "step_trl", "max_model_len": length}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            known = ", ".join(map(repr, self._names))
            raise RequestError("model", f"{shown(name)} is not served. Set {known}.", 404, "model_not_found")

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._api_key is not None and request.path.startswith("/v1/"):
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
                raise RequestError(
                    None, "No valid API key. Send the endpoint's key as `Authorization: Bearer KEY`.", 401,
                    "invalid_api_key",
                )  # fmt: skip
        return await handler(request)

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            return _json(error_body(str(error), error.status, error.param, error.code), error.status)
        except web.HTTPException as error:
            return _json(error_body(f"{request.method} {request.path}: {error.reason}.", error.status), error.status)
        except Exception as error:
            message, status = self._describe(error)
            return _json(error_body(message, status), status)

    def _describe(self, error: Exception) -> tuple[str, int]:
        """Log an error, and return what a client is told, without the server's address and command line."""
        if isinstance(error, EngineUnavailableError):
            logger.warning("%s", error)
            return "The vLLM server behind this endpoint does not answer. Try again later.", 503
        if isinstance(error, EngineError):
            logger.error("%s", error)
            return "The vLLM server behind this endpoint refused a call. The endpoint's log has the reason.", 502
        logger.error("A request failed", exc_info=error)
        return "The endpoint failed. Its log has the reason.", 500


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
