"""The endpoint before a real vLLM server on the testbed model, with OpenAI's client."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest
from rollout.faulty_proxy import FaultyProxy
from rollout.server_metrics import generated_tokens, open_requests, until
from running_endpoint import client, running, together

from step_trl import testbed
from step_trl.endpoint import ExitOptions
from step_trl.rollout import (
    AnswerConsistency,
    ConfidenceTruncation,
    DynamicTruncatedRollout,
    SamplingParams,
    TokenBudget,
)
from step_trl.rollout.engines import VLLMServerEngine
from step_trl.text import THINK_END


pytestmark = pytest.mark.timeout(300)

MAX_TOKENS = 200


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def conversations():
    return testbed.load_dataset("train").select(range(64))["prompt"]


@pytest.fixture(scope="module")
def prompts(tokenizer, conversations):
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations]


@pytest.fixture(scope="module")
def url(vllm_server, tokenizer):
    engine = VLLMServerEngine(vllm_server.url, tokenizer, retry_window=2)
    with running(engine, ExitOptions(exit_confidence=0.95), names=["testbed"]) as url:
        yield url


def rollouts(vllm_server, tokenizer, callbacks, prompts, seeds, **sampling):
    """What the endpoint must be equal to."""
    engine = VLLMServerEngine(vllm_server.url, tokenizer)
    params = SamplingParams(MAX_TOKENS, **sampling)
    return DynamicTruncatedRollout(engine, callbacks, params).run(prompts, seeds=seeds)


def in_parts(tokenizer, record) -> tuple[str, str]:
    """The thought of a rollout and its answer."""
    thought, _, answer = tokenizer.decode(record.completion_ids, skip_special_tokens=True).partition(THINK_END)
    return thought.lstrip("\n"), answer.lstrip("\n")


def check_report(choice, record):
    report = choice.early_exit
    assert report["exited"] == record.truncated and report["probes"] == len(record.probes)
    # How many tokens of an abandoned probe are read depends on when they arrive.
    complete = [len(probe.token_ids) for probe in record.probes if probe.outcome != "abandoned"]
    assert report["probe_tokens"] >= sum(complete) + len(record.probes) - len(complete)
    if len(complete) == len(record.probes):
        assert report["probe_tokens"] == sum(complete)
    if record.truncated:
        assert report["by"] == "exit_confidence" and report["confidence"] == record.probes[-1].confidence > 0.95
        assert report["position"] == record.probes[-1].position == record.injected.index(True)
        assert report["saved_tokens_at_most"] == MAX_TOKENS - len(record.completion_ids)
    else:
        assert report["by"] is report["position"] is report["confidence"] is None
        assert report["saved_tokens_at_most"] == 0
    assert choice.finish_reason == ("stop" if record.ended else "length")


# Equality with the rollout


def test_64_clients_at_once_get_the_rollouts_of_their_seeds(url, vllm_server, tokenizer, conversations, prompts):
    async def ask(shared, seed):
        return await shared.chat.completions.create(
            model="testbed",
            messages=conversations[seed],
            seed=seed,
            max_tokens=MAX_TOKENS,
            temperature=0.8,
            top_p=0.95,
        )

    answers = together(url, ask, range(64))
    callback = ConfidenceTruncation(tokenizer)
    records = rollouts(vllm_server, tokenizer, [callback], prompts, range(64), temperature=0.8, top_p=0.95)
    end = tokenizer.encode(THINK_END, add_special_tokens=False)[0]
    for answer, record, prompt in zip(answers, records, prompts, strict=True):
        (choice,) = answer.choices
        assert (choice.message.reasoning or "", choice.message.content or "") == in_parts(tokenizer, record)
        assert answer.usage.completion_tokens == len(record.completion_ids)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.total_tokens == len(prompt) + len(record.completion_ids)
        closed = [*record.completion_ids, end].index(end) + (end in record.completion_ids)
        assert answer.usage.completion_tokens_details.reasoning_tokens == closed
        assert answer.usage.early_exit["saved_tokens_at_most"] == choice.early_exit["saved_tokens_at_most"]
        check_report(choice, record)
    assert 16 < sum(record.truncated for record in records) < 64


def test_streams_are_the_same_text(url, vllm_server, tokenizer, conversations, prompts):
    async def ask(shared, seed):
        stream = await shared.chat.completions.create(
            model="testbed", messages=conversations[seed], seed=seed, max_tokens=MAX_TOKENS, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        return [chunk async for chunk in stream]

    streams = together(url, ask, range(24))
    records = rollouts(vllm_server, tokenizer, [ConfidenceTruncation(tokenizer)], prompts[:24], range(24))
    for chunks, record in zip(streams, records, strict=True):
        *texts, usage = chunks
        deltas = [chunk.choices[0].delta for chunk in texts]
        assert deltas[0].role == "assistant" and not any(delta.role for delta in deltas[1:])
        reasoning = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        assert (reasoning, "".join(delta.content or "" for delta in deltas)) == in_parts(tokenizer, record)
        assert [chunk.choices[0].finish_reason for chunk in texts[:-1]] == [None] * (len(texts) - 1)
        check_report(texts[-1].choices[0], record)
        assert not usage.choices and usage.usage.completion_tokens == len(record.completion_ids)
        assert len({chunk.id for chunk in chunks}) == 1
        assert len(texts) > len(record.completion_ids) / 40  # it arrived in pieces
    assert sum(record.truncated for record in records) > 6


@pytest.mark.parametrize("stream", [False, True])
def test_several_completions_of_several_prompts_as_text(url, vllm_server, tokenizer, prompts, stream):
    """Completion `i` of a prompt has the seed `seed + i`, and its thought is a part of its text."""
    asked = {"prompt": prompts[:4], "n": 3, "seed": 7, "max_tokens": MAX_TOKENS, "stream": stream}
    answer = client(url).completions.create(model="testbed", **asked)
    repeated = [prompt for prompt in prompts[:4] for _ in range(3)]
    records = rollouts(vllm_server, tokenizer, [ConfidenceTruncation(tokenizer)], repeated, [7, 8, 9] * 4)
    texts = [""] * 12
    for choice in [c for chunk in answer for c in chunk.choices] if stream else answer.choices:
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            check_report(choice, records[choice.index])
    assert texts == [tokenizer.decode(record.completion_ids, skip_special_tokens=True) for record in records]
    if not stream:
        assert answer.usage.prompt_tokens == sum(map(len, prompts[:4]))


def test_a_text_is_encoded_as_the_server_does(url, tokenizer, prompts):
    asked = {"model": "testbed", "max_tokens": 40, "seed": 1}
    texts, ids = (
        [choice.text for choice in client(url).completions.create(prompt=prompt, **asked).choices]
        for prompt in (list(map(tokenizer.decode, prompts[:3])), prompts[:3])
    )
    assert texts == ids


@pytest.mark.parametrize(
    ("options", "callbacks"),
    [
        ({"exit_confidence": 0.8}, lambda t: [ConfidenceTruncation(t, threshold=0.8)]),
        ({"exit_confidence": None}, lambda t: []),
        ({"exit_confidence": None, "exit_consistency": 2}, lambda t: [AnswerConsistency(t, window=2)]),
        ({"exit_confidence": None, "thinking_token_budget": 50}, lambda t: [TokenBudget(t, 50)]),
        ({"thinking_token_budget": 90}, lambda t: [ConfidenceTruncation(t), TokenBudget(t, 90)]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_request_says_when_its_thought_ends(url, vllm_server, tokenizer, conversations, prompts, options, callbacks):
    async def ask(shared, seed):
        return await shared.chat.completions.create(
            model="testbed", messages=conversations[seed], seed=seed, max_tokens=MAX_TOKENS, extra_body=options
        )

    answers = together(url, ask, range(12))
    records = rollouts(vllm_server, tokenizer, callbacks(tokenizer), prompts[:12], range(12))
    for answer, record in zip(answers, records, strict=True):
        message = answer.choices[0].message
        assert (message.reasoning or "", message.content or "") == in_parts(tokenizer, record)
        assert answer.choices[0].early_exit["exited"] == record.truncated
    reasons = {answer.choices[0].early_exit["by"] for answer in answers}
    wanted = {name for name, value in ({"exit_confidence": 0.95} | options).items() if value is not None}
    assert reasons - {None} == wanted


# Equality with the server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, "\n\n", ["= 1", "Wait, let"]], ids=str)
def test_without_exits_it_is_the_bare_server(url, vllm_server, prompts, stop, stream):
    def ask(base_url, prompt, **further):
        answer = client(base_url).completions.create(
            model=None, prompt=prompt, temperature=0, max_tokens=tokens, stop=stop, stream=stream, extra_body=further
        )
        chunks = list(answer) if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        used = None if stream else answer.usage.completion_tokens
        return "".join(choice.text for choice in choices), choices[-1].finish_reason, used

    tokens, reasons = 40 if stop is None else 120, []
    for prompt in prompts[:4]:
        ours = ask(url, prompt, exit_confidence=None)
        assert ours == ask(f"{vllm_server.url}/v1", prompt)
        reasons.append(ours[1])
    assert stop is None or "stop" in reasons


def test_stop_strings_end_the_answer_and_the_work(url, vllm_server, conversations):
    asked = {"model": "testbed", "messages": conversations[1], "seed": 5, "max_tokens": 900}
    whole = client(url).chat.completions.create(**asked).choices[0].message
    middle = whole.content[4:8]
    for stream in (False, True):
        answer = client(url).chat.completions.create(**asked, stop=[middle], stream=stream)
        if stream:
            content = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            content = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
        assert content == whole.content.partition(middle)[0]
    assert until(lambda: open_requests(vllm_server.url) == 0, seconds=5)


def test_a_thought_that_the_prompt_closed_has_no_exits(url, vllm_server, tokenizer, prompts):
    """The model may write `</think>` again, but nothing is injected: it is the rollout without callbacks."""
    closed = f"{tokenizer.decode(prompts[0])}5.\n</think>\n\n"
    ids = tokenizer(closed, add_special_tokens=False)["input_ids"]
    asked = {"model": "testbed", "prompt": closed, "max_tokens": MAX_TOKENS, "seed": 3}
    (choice,) = client(url).completions.create(**asked, extra_body={"thinking_token_budget": 2}).choices
    assert not choice.early_exit["exited"]
    (record,) = rollouts(vllm_server, tokenizer, [], [ids], [3])
    assert choice.text == tokenizer.decode(record.completion_ids, skip_special_tokens=True)


# Clients that leave, and servers that are gone


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_nothing_running(url, vllm_server, conversations, stream):
    async def ask(shared, messages):
        asked = {"model": "testbed", "messages": messages, "n": 2, "max_tokens": 900, "stream": stream}
        answer = await shared.chat.completions.create(**asked, extra_body={"exit_confidence": 1.0})
        if stream:
            async for _ in answer:
                pass

    async def leave():
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as shared:
            asking = [asyncio.ensure_future(ask(shared, messages)) for messages in conversations[:16]]
            assert await asyncio.to_thread(until, lambda: open_requests(vllm_server.url) >= 8, seconds=20)
            for task in asking:
                task.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert sum(isinstance(result, asyncio.CancelledError) for result in results) >= 8

    before = generated_tokens(vllm_server.url)
    asyncio.run(leave())
    assert until(lambda: open_requests(vllm_server.url) == 0, seconds=5)
    after = generated_tokens(vllm_server.url)
    time.sleep(0.5)
    assert generated_tokens(vllm_server.url) == after
    assert after - before < 32 * 120  # to their ends it would be 160 each, and their probes


def test_a_server_that_is_gone_is_told(vllm_server, tokenizer, conversations):
    asked = {"model": "testbed", "messages": conversations[0], "max_tokens": 900, "seed": 1}
    with FaultyProxy(vllm_server.url) as proxy:
        engine = VLLMServerEngine(proxy.url, tokenizer, retry_window=1)
        with running(engine, ExitOptions(exit_confidence=0.95), names=["testbed"]) as url:
            whole = client(url).chat.completions.create(**asked)
            stream = client(url).chat.completions.create(**asked | {"temperature": 2.0}, stream=True)
            assert next(stream).choices
            proxy.go_away()
            with pytest.raises(openai.APIError, match="The vLLM server behind this endpoint does not answer"):
                list(stream)
            for streamed in (False, True):
                with pytest.raises(openai.InternalServerError) as caught:
                    client(url).chat.completions.create(**asked, stream=streamed)
                assert caught.value.status_code == 503
            proxy.come_back()
            again = client(url).chat.completions.create(**asked)
            assert again.choices[0].message == whole.choices[0].message
    assert until(lambda: open_requests(vllm_server.url) == 0, seconds=5)
