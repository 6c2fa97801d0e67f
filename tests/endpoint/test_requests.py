"""Hostile and clumsy requests: each is refused by an error that names the field, its value and the remedy."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request

import openai
import pytest
from running_endpoint import MAX_LENGTH, client, running, without_server

from step_trl import testbed
from step_trl.endpoint import ExitOptions


CHAT = {"model": "served", "messages": [{"role": "user", "content": "1 + 1"}]}
TEXT = {"model": "served", "prompt": "1 + 1"}
KEY = "sk-only-for-this-test"


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def url(tokenizer):
    """An endpoint whose vLLM server does not answer: what is refused, is refused before any sampling."""
    with running(without_server(tokenizer), ExitOptions(exit_confidence=0.95)) as url:
        yield url


def answer(url: str, path: str, body: bytes | dict, headers=None) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        assert error.headers["Content-Type"].startswith("application/json")
        return error.code, json.load(error)


def message(**fields) -> dict:
    return CHAT | {"messages": [{"role": "user", "content": "1 + 1"} | fields]}


CHATS = [
    ({"messages": []}, "messages", "messages: [] is not a list of messages. Send at least one."),
    ({"messages": "hi"}, "messages", "messages: 'hi' is not a list"),
    ({"messages": ["hi"]}, "messages[0]", "is not a message"),
    (message(role="king"), "messages[0].role", "'king' is not a role. Set one of system, developer, user,"),
    (message(content=None), "messages[0].content", "None is not a text or a list of text parts"),
    (message(content=7), "messages[0].content", "7 is not a text"),
    (message(content=["a"]), "messages[0].content[0]", "is not a part of a message"),
    (message(content=[{"type": "image_url"}]), "messages[0].content[0].type", "'image_url' is not supported"),
    (message(content=[{"type": "text"}]), "messages[0].content[0].text", "is missing"),
    (message(tool_calls=[{"id": "1"}]), "messages[0].tool_calls", "is not supported"),
    (message(mood="good"), "messages[0].mood", "'good': unknown field"),
    ({"temperature": -1}, "temperature", "-1 is not a number in range. Set at least 0 and at most 100."),
    ({"temperature": "hot"}, "temperature", "'hot' is not a number in range"),
    ({"temperature": True}, "temperature", "True is not a number in range"),
    ({"top_p": 0}, "top_p", "0 is not a number in range. Set more than 0 and at most 1."),
    ({"top_k": 1.5}, "top_k", "1.5 is not an integer in range"),
    ({"top_k": 10**30}, "top_k", "is not an integer in range"),
    ({"min_p": 2}, "min_p", "2 is not a number in range"),
    ({"seed": 2**63}, "seed", "is not an integer in range"),
    ({"n": 0}, "n", "0 is not an integer in range. Set an integer from 1 to 128."),
    ({"n": 10**9}, "n", "1000000000 is not an integer in range"),
    ({"max_tokens": 0}, "max_tokens", "0 is not an integer in range"),
    ({"max_completion_tokens": 1.0}, "max_completion_tokens", "1.0 is not an integer in range"),
    ({"max_tokens": 5000}, "max_tokens", "5000 after a prompt of 13 tokens exceeds the model's context of 1024"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens", "5000 after a prompt of 13 tokens exceeds"),
    ({"stop": 3}, "stop", "3 is not a string or a list of at most 16"),
    ({"stop": ["a", ""]}, "stop", "has an entry that is not a string of 1 to 128 characters"),
    ({"stop": ["a"] * 17}, "stop", "is not a string or a list of at most 16"),
    ({"stop": "a" * 129}, "stop", "has an entry that is not a string of 1 to 128"),
    ({"stream": "yes"}, "stream", "'yes' is not a boolean. Set true or false."),
    ({"stream_options": {"include_usage": True}}, "stream_options", "is for streams. Set stream to true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ({"logprobs": True}, "logprobs", "True is not supported. Tokens that the endpoint writes"),
    ({"top_logprobs": 3}, "top_logprobs", "3 is not supported. Tokens that the endpoint writes"),
    ({"presence_penalty": 0.5}, "presence_penalty", "0.5 is not supported. Leave it out."),
    ({"logit_bias": {"5": 1}}, "logit_bias", "{'5': 1} is not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "Set exit_confidence or thinking_token_budget instead."),
    ({"exit_confidence": 1.5}, "exit_confidence", "1.5 is not a number in range. Set at least 0 and at most 1."),
    ({"exit_confidance": 0.9}, "exit_confidance", "0.9: unknown field. Set exit_confidence, or leave it out."),
    ({"exit_consistency": 1}, "exit_consistency", "1 is not an integer in range. Set an integer from 2"),
    ({"thinking_token_budget": 0}, "thinking_token_budget", "0 is not an integer in range. Set an integer from 1"),
    ({"model": "gpt-4"}, "model", "'gpt-4' is not served. Set 'served'."),
    ({"model": 4}, "model", "4 is not a string"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "[] is not an object"),
    (
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs.chat_template",
        "is set by the endpoint. Leave it out.",
    ),
    (message(content="1 + 1 " * 600), "messages", "tokens leave no room for a completion in the model's context"),
    (message(content="1" * 10**6), "messages", "characters do not fit the model's context of 1024 tokens"),
]
TEXTS = [
    ({"prompt": None}, "prompt", "None is not a text, a list of token ids, or a list of either"),
    ({"prompt": []}, "prompt", "[] is not a text"),
    ({"prompt": ""}, "prompt", "'' is not a text"),
    ({"prompt": [[]]}, "prompt", "[[]] is not a text"),
    ({"prompt": ["a", 5]}, "prompt", "is not a text"),
    ({"prompt": [1, True]}, "prompt", "is not a text"),
    ({"prompt": [5, -1]}, "prompt", "-1 is no token id. Send ids below 463."),
    ({"prompt": [5, 10**20]}, "prompt", f"{10**20} is no token id"),
    ({"prompt": [5] * MAX_LENGTH}, "prompt", "1024 tokens leave no room for a completion"),
    ({"prompt": ["a"] * 129}, "prompt", "129 prompts are too many. Send at most 128."),
    ({"prompt": ["a"] * 5, "n": 100}, "n", "100 completions of 5 prompts are more than 128"),
    ({"logprobs": 0}, "logprobs", "0 is not supported"),
    ({"echo": True}, "echo", "True is not supported"),
    ({"suffix": "b"}, "suffix", "'b' is not supported"),
    ({"best_of": 4}, "best_of", "4 is not supported"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [("/chat/completions", CHAT | body, param, words) for body, param, words in CHATS]
    + [("/completions", TEXT | body, param, words) for body, param, words in TEXTS],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_a_wrong_field_is_named(url, path, body, param, words):
    status, told = answer(url, path, body)
    assert status == (404 if words.endswith("Set 'served'.") else 400)
    error = told["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert error["message"].startswith(f"{param}: ") and words in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe", b'{"messages": NaN}', b'{"temperature": 1e999}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"n": 1' * 3,
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_a_body_that_is_no_object_is_refused(url, path, body):
    status, told = answer(url, path, body)
    assert status == 400 and told["error"]["message"].endswith("Send a JSON object.")
    assert len(told["error"]["message"]) < 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/chat/completions", 405), ("POST", "/embeddings", 404), ("POST", "/models", 405), ("GET", "/", 404)],
)
def test_other_paths_and_methods_have_errors_of_the_same_shape(url, method, path, status):
    host = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request(method, f"/v1{path}", b"{}" if method == "POST" else None)
    response = connection.getresponse()
    assert response.status == status
    assert json.load(response)["error"]["message"].startswith(f"{method} /v1{path}: ")


def test_a_body_that_is_too_large_is_refused(url):
    status, told = answer(url, "/completions", b'{"prompt": "' + b"a" * 2**25 + b'"}')
    assert status == 413 and told["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_does_not_answer_is_a_503(url, stream):
    """Neutral and ignored fields do not hinder: the request comes as far as the server."""
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": None,
        "top_k": -1, "min_p": 0.0, "parallel_tool_calls": True, "service_tier": "auto", "seed": -5, "stop": None,
    }  # fmt: skip
    echoed = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "1 + 1", "name": "me"},
        {"role": "assistant", "content": None, "refusal": None, "reasoning": "One more.", "tool_calls": None},
        {"role": "user", "content": "Well?"},
    ]
    with pytest.raises(openai.InternalServerError) as caught:
        client(url).chat.completions.create(
            model="served", messages=echoed, stream=stream, extra_body=harmless, max_completion_tokens=10
        )
    assert caught.value.status_code == 503
    assert caught.value.body["message"] == "The vLLM server behind this endpoint does not answer. Try again later."
    health = urllib.request.Request(url.removesuffix("/v1") + "/health")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(health, timeout=60)


def test_models_are_listed(url):
    (listed,) = client(url).models.list().data
    assert (listed.id, listed.max_model_len) == ("served", MAX_LENGTH)
    assert client(url).models.retrieve("served") == listed
    with pytest.raises(openai.NotFoundError, match="model: 'other' is not served"):
        client(url).models.retrieve("other")


def test_a_key_is_asked_for(tokenizer):
    with running(without_server(tokenizer), ExitOptions(exit_confidence=0.95), api_key=KEY) as url:
        assert client(url, KEY).models.list().data
        for wrong in (b"other", KEY[:-1].encode(), f"{KEY}x".encode(), "ключ".encode(), b"\xff"):
            status, told = answer(url, "/completions", TEXT, {"Authorization": b"Bearer " + wrong})
            assert status == 401 and told["error"]["code"] == "invalid_api_key"
            assert KEY not in told["error"]["message"]
        assert answer(url, "/completions", TEXT)[0] == 401


def test_a_model_without_a_chat_template_has_text_completions(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with running(without_server(tokenizer), ExitOptions(exit_confidence=0.95)) as url:
        status, told = answer(url, "/chat/completions", CHAT)
        assert status == 400 and told["error"]["message"].endswith("no chat template. Use /v1/completions.")
        assert answer(url, "/completions", TEXT)[0] == 503


def test_a_template_that_refuses_is_a_wrong_request(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('Only one message is allowed.') }}")
    with running(without_server(tokenizer), ExitOptions(exit_confidence=0.95)) as url:
        status, told = answer(url, "/chat/completions", CHAT)
        assert status == 400
        assert told["error"]["message"] == "messages: the chat template refuses them: Only one message is allowed."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_confidence": 1.2}, "exit_confidence: 1.2 is not between 0 and 1"),
        ({"exit_consistency": 1}, "exit_consistency: 1 is too small. Set at least 2."),
        ({"thinking_token_budget": 0}, "thinking_token_budget: 0 is too small. Set at least 1."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ExitOptions(**options)
