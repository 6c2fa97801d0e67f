"""Ask a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..retry import RetryWindow


if TYPE_CHECKING:
    from openai import AsyncOpenAI


class ChatError(RuntimeError):
    """The endpoint refuses a call or does not answer."""


class ChatClient:
    """
    Asks single questions, and repeats them while the server is down or overloaded.

    The arguments are those of [`StepJudge`]. The key is never taken from the environment. `None` removes an option.
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
            raise ValueError(f"base_url: {base_url!r} is not a URL. Set for example http://localhost:8000/v1.")
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ImportError(
                "openai: is not installed, and the judge needs it. In your clone of step_trl, run: pip install -e "
                "'.[judge]'"
            ) from None
        self.base_url = base_url if urlsplit(base_url).path else f"{base_url}/v1"
        self.url = f"{self.base_url}/chat/completions"
        self.model, self.timeout, self.retry_window = model, timeout, retry_window
        self.options = {name: value for name, value in options.items() if value is not None}
        self._api_key = api_key

    def session(self) -> AsyncOpenAI:
        """Return a client for the calls of one event loop. The caller closes it."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        return AsyncOpenAI(
            api_key=self._api_key or "none",
            base_url=self.base_url,
            max_retries=0,  # it counts retries, and cannot retry answers that are errors
            http_client=DefaultAsyncHttpxClient(timeout=self.timeout, follow_redirects=False, trust_env=False),
        )

    async def ask(self, client: AsyncOpenAI, content: str) -> str:
        """
        Return the model's answer, which may be empty.

        Raises:
            `ChatError`: If the server refuses the call, or does not answer within `retry_window`.
        """
        from openai import APIConnectionError, APIStatusError, Omit

        messages: Any = [{"role": "user", "content": content}]
        # The client would send what OpenAI's environment variables hold to any server.
        omitted = ["OpenAI-Organization", "OpenAI-Project", *([] if self._api_key else ["Authorization"])]
        headers: Any = {name: Omit() for name in omitted}
        create = client.chat.completions.with_raw_response.create
        window = RetryWindow(self.retry_window, longest_delay=20.0)
        while True:
            try:
                call = create(model=self.model, messages=messages, extra_body=self.options, extra_headers=headers)
                text = (await asyncio.wait_for(call, self.timeout)).text
                if (answer := _answer(text)) is not None:
                    return answer
                reason = f"status 200: {self._hide_key(text)[:500]}"
            except APIStatusError as error:
                reason = f"status {error.status_code}: {self._hide_key(error.response.text)[:500]}"
                if error.status_code < 500 and error.status_code not in (408, 429):
                    raise self._refusal(error.status_code, reason) from None
            except (APIConnectionError, asyncio.TimeoutError) as error:
                cause = error.__cause__ or error
                reason = f"{type(cause).__name__}: {cause}"
            if not window.note_failure():
                raise ChatError(
                    self._hide_key(
                        f"base_url: {self.url} did not answer: {window}, the last one ended with {reason}. Check that "
                        "the server runs, ask for fewer answers at once, or set a longer `retry_window`."
                    )
                )
            await window.wait()

    def _refusal(self, status: int, reason: str) -> ChatError:
        if status in (401, 403):
            given = "a key was given" if self._api_key else "no key was given"
            text = f"api_key: {self.url} refuses the call ({given}; {reason}). Set the server's key."
        else:
            text = (
                f"{self.url} refuses the call ({reason}). Check `base_url`, model={self.model!r} and the options "
                f"{self.options}."
            )
        return ChatError(self._hide_key(text))

    def _hide_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


def _answer(text: str) -> str | None:
    """Read an answer, `None` if there is none: gateways report some errors with status 200."""
    try:
        return str(json.loads(text)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        return None
