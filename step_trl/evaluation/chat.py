"""Ask a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp


_FIRST_DELAY, _LONGEST_DELAY = 0.25, 20.0  # seconds between two attempts


class ChatError(RuntimeError):
    """Raised if the endpoint refuses a call or does not answer."""


class ChatClient:
    """
    Asks one question at a time, and retries while the server is down or overloaded.

    Args:
        base_url (`str`):
            The address of the server, with the path before `/chat/completions`. The default path is `/v1`.
        model (`str`):
            The name of the model on the server.
        api_key (`str`, *optional*):
            The API key. It is sent as a bearer token and never shown.
        options (`Mapping[str, Any]`):
            Further fields of the request body. Fields that are `None` are not sent.
        timeout (`float`):
            The time limit for one answer, in seconds.
        retry_window (`float`):
            The time from the first failure of a call until it is given up, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None,
        options: Mapping[str, Any],
        timeout: float,
        retry_window: float,
    ):
        base_url = base_url.rstrip("/")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: {base_url!r} is not an address. Set, for example, http://localhost:8000/v1.")
        self.url = f"{base_url}{'' if urlsplit(base_url).path else '/v1'}/chat/completions"
        self.model, self.retry_window = model, retry_window
        self.options = {name: value for name, value in options.items() if value is not None}
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    def session(self, max_connections: int) -> aiohttp.ClientSession:
        """Return a session for the calls of one event loop. The caller has to close it."""
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        connector = aiohttp.TCPConnector(limit=max_connections)
        return aiohttp.ClientSession(headers=headers, timeout=self._timeout, connector=connector)

    async def ask(self, session: aiohttp.ClientSession, content: str) -> str:
        """
        Return the model's answer, empty if it gave none.

        Raises:
            `ChatError`: If the server refuses the call, or does not answer within `retry_window`.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}
        delay, attempts, failed_at = _FIRST_DELAY, 0, 0.0
        while True:
            try:
                async with session.post(self.url, json=body, allow_redirects=False) as response:
                    text = self._hide_key(await response.text(errors="replace"))
                answer = _answer(text) if response.status < 300 else None
                if answer is not None:
                    return answer
                reason = f"status {response.status}: {text[:500]}"
                if 300 <= response.status < 500 and response.status not in (408, 429):
                    raise self._refusal(response.status, reason)
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
            now = time.monotonic()
            attempts += 1
            failed_at = failed_at or now
            left = failed_at + self.retry_window - now
            if left <= 0:
                raise self._error(
                    f"base_url: {self.url} did not answer: {attempts} attempts in {now - failed_at:.0f} s "
                    f"(retry_window={self.retry_window:g}), the last one failed with {reason}. Check that the server "
                    "is running, ask for fewer answers at once, or set a longer `retry_window`."
                )
            await asyncio.sleep(min(delay, left))
            delay = min(2 * delay, _LONGEST_DELAY)

    def _refusal(self, status: int, reason: str) -> ChatError:
        if status in (401, 403):
            given = "a key was given" if self._api_key else "no key was given"
            return self._error(f"api_key: {self.url} refuses the call ({given}; {reason}). Set the server's key.")
        return self._error(
            f"{self.url} refuses the call ({reason}). Check `base_url`, model={self.model!r} and the options "
            f"{self.options}."
        )

    def _error(self, text: str) -> ChatError:
        return ChatError(self._hide_key(text))

    def _hide_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


def _answer(text: str) -> str | None:
    """Return '' if the model said nothing, `None` for no answer at all: some gateways report errors as successes."""
    try:
        return str(json.loads(text)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        return None
