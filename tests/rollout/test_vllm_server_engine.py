"""The engine over a vLLM server, against a real one on the testbed model."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import warnings

import pytest
import torch
from rollout.server_metrics import generated_tokens, open_requests, until
from rollout.tiny_models import assert_logprobs, log_probabilities, run
from rollout.well_formed import assert_well_formed
from small_tokenizers import trained

from step_trl import testbed
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import EngineError, EngineUnavailableError, Generation, VLLMServerEngine
from step_trl.rollout.engines.stop_strings import StopStrings
from step_trl.rollout.engines.vllm_answers import Choice, Sampled, TokenLogprobs
from step_trl.rollout.engines.vllm_checks import ServerChecks
from step_trl.rollout.engines.vllm_http import ConnectionLostError, Server
from step_trl.rollout.engines.vllm_process import VLLMServer, free_port, server_command
from step_trl.steps import TriggerSegmenter, token_bytes


pytestmark = pytest.mark.timeout(300)

TRIGGERS = ("Wait", "Alternatively")
KEY = "sk-only-for-this-test"


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return testbed.load_model().eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    problems = testbed.load_dataset("train").select(range(64))["prompt"]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]


@pytest.fixture(scope="module")
def engine(vllm_server, tokenizer):
    return VLLMServerEngine(vllm_server.url, tokenizer)


@pytest.fixture(scope="module")
def wholes(engine, prompts):
    """One call for each of the first prompts, with its number as seed."""
    return run(*(engine.generate(p, max_tokens=200, seed=i) for i, p in enumerate(prompts[:32])))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with an API key and with the flags that `check` complains about; its test may kill it."""
    log_file = tmp_path_factory.mktemp("vllm") / "guarded.log"
    flags = ["--logprobs-mode", "raw_logprobs", "--no-enable-prefix-caching"]
    server = VLLMServer(testbed.MODEL_DIR, max_model_len=512, api_key=KEY, extra_arguments=flags, log_file=log_file)
    with server:
        yield server


# Equality with the model


@torch.no_grad()
def processed_logprobs(model, prompt, generation, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    logits = model(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1] / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    if top_p < 1:
        ranked, order = logits.softmax(-1).sort(descending=True)
        beyond = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ranked.cumsum(-1) - ranked >= top_p)
        logits[beyond] = -torch.inf
    if min_p:
        probabilities = logits.softmax(-1)
        logits[probabilities < min_p * probabilities.amax(-1, keepdim=True)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"top_p": 0.9}, {"temperature": 0.8, "min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("abandon", [None, lambda token_ids, logprobs: False], ids=["plain", "streamed"])
def test_sampled_logprobs_are_those_of_the_processed_distribution(engine, model, prompts, options, abandon):
    # Greedy calls are in the same batches: their options must not leak.
    calls = [engine.generate(p, max_tokens=60, abandon=abandon, **options) for p in prompts[:6]]
    greedy = [engine.generate(p, max_tokens=30, temperature=0.0, abandon=abandon) for p in prompts[:2]]
    results = run(*calls, *greedy)
    for prompt, generation in zip(prompts, results[:6]):
        expected = processed_logprobs(model, prompt, generation, **options)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)
    for prompt, generation in zip(prompts, results[6:]):
        assert_logprobs(model, prompt, generation, tolerance=1e-4)


@torch.no_grad()
def test_greedy_equals_the_model_and_eos_ends_a_call(engine, model, tokenizer, prompts):
    results = run(*(engine.generate(p, max_tokens=200, temperature=0.0) for p in prompts[:16]))
    for prompt, generation in zip(prompts, results):
        logits = model(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1]
        assert generation.token_ids == logits.argmax(-1).tolist()
        assert_logprobs(model, prompt, generation, tolerance=1e-4)
        ends = [token_id == tokenizer.eos_token_id for token_id in generation.token_ids]
        assert not any(ends[:-1])
        assert generation.finish_reason == ("eos" if ends[-1] else "length")
    assert sum(generation.finish_reason == "eos" for generation in results) >= 4


def test_length_ends_a_call(engine, prompts):
    (generation,) = run(engine.generate(prompts[0], max_tokens=7))
    assert (len(generation.token_ids), len(generation.logprobs), generation.finish_reason) == (7, 7, "length")


def test_logprobs_of_given_tokens_are_the_models(engine, model, tokenizer, prompts, monkeypatch):
    given = [tokenizer.encode(text, add_special_tokens=False) for text in ("12 + 7", "</think><|im_end|> 4", "Wait")]
    calls = [engine.generate(p, max_tokens=30, temperature=0.6, stop=("=",)) for p in prompts[:3]]
    found = run(*(engine.logprobs_of(p, ids) for p, ids in zip(prompts, given)), *calls)
    for prompt, ids, logprobs in zip(prompts, given, found):
        assert logprobs == pytest.approx(log_probabilities(model, prompt, ids).tolist(), abs=1e-4)
    for prompt, generation in zip(prompts, found[3:]):
        expected = processed_logprobs(model, prompt, generation, 0.6)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr("step_trl.rollout.engines.vllm_server.read_logprob", lambda content, token_id: None)
    with pytest.raises(EngineError, match=r"logprob_token_ids: .* does not return .* vLLM that does, such as 0\.31"):
        run(engine.logprobs_of(prompts[0], given[0]))


# How calls end


@pytest.mark.parametrize("interval", [None, 1, 7], ids=["plain", "streamed", "streamed by 7"])
def test_stop_strings_cut_exactly(vllm_server, tokenizer, prompts, wholes, interval):
    """Triggers, a special token, and pieces of text from within a token to several tokens long."""
    engine = VLLMServerEngine(vllm_server.url, tokenizer, stream_interval=interval or 1)
    abandon = None if interval is None else lambda token_ids, logprobs: False
    pieces, segmenter = token_bytes(tokenizer), TriggerSegmenter(tokenizer, TRIGGERS)
    cases = []
    for seed, whole in enumerate(wholes):
        text = b"".join(pieces[token_id] for token_id in whole.token_ids).decode()
        middle = len(text) // 2
        stops = [TRIGGERS, ("Alternatively",), ("Alternatively, ", "Wait,"), ("</think>",)]
        stops += [(text[middle : middle + 3],), (text[20:31], text[middle : middle + 5])]
        cases += [(seed, whole, stop) for stop in stops if any(string in text for string in stop)]
    assert sum(stop == ("Alternatively",) for _, _, stop in cases) >= 4
    assert len(cases) > 100
    calls = [
        engine.generate(prompts[seed], max_tokens=200, seed=seed, stop=stop, abandon=abandon)
        for seed, _, stop in cases
    ]
    for (_, whole, stop), generation in zip(cases, run(*calls), strict=True):
        text, end = b"", 0
        while not any(string.encode() in text for string in stop):
            text, end = text + pieces[whole.token_ids[end]], end + 1
        assert generation.token_ids == whole.token_ids[:end]
        assert len(generation.logprobs) == end
        assert generation.finish_reason == "stop"
        if stop == TRIGGERS:
            assert segmenter.boundaries(whole.token_ids)[0] == end == segmenter.boundaries(generation.token_ids)[-1]


def test_stop_strings_do_not_look_into_the_prompt(engine, tokenizer, prompts):
    (whole,) = run(engine.generate(prompts[0], max_tokens=12, temperature=0.0))
    path = [*prompts[0], *whole.token_ids[:6]]
    across = tokenizer.decode(whole.token_ids[4:8])
    (generation,) = run(engine.generate(path, max_tokens=6, temperature=0.0, stop=(across,)))
    assert generation.token_ids == whole.token_ids[6:]


def test_abandon_ends_a_call_and_its_work(vllm_server, tokenizer, prompts):
    engine = VLLMServerEngine(vllm_server.url, tokenizer, stream_interval=1)
    seen = []

    def third(token_ids, logprobs) -> bool:
        seen.append((len(token_ids), len(logprobs)))
        return len(token_ids) >= 3

    async def scenario():
        whole = await engine.generate(prompts[0], max_tokens=30, temperature=0.0)
        before = await asyncio.to_thread(generated_tokens, vllm_server.url)
        abandoned = await engine.generate(prompts[0], max_tokens=900, temperature=0.0, abandon=third)
        assert abandoned.finish_reason == "abandoned"
        count = len(abandoned.token_ids)  # more than 3 where the server was faster than its sender
        assert 3 <= count < 30
        assert abandoned.token_ids == whole.token_ids[:count]
        assert abandoned.logprobs == pytest.approx(whole.logprobs[:count], abs=1e-4)
        assert seen[-1] == (count, count)
        assert await asyncio.to_thread(until, lambda: open_requests(vllm_server.url) == 0, seconds=5)
        assert generated_tokens(vllm_server.url) - before < 50

    asyncio.run(scenario())


@pytest.mark.parametrize("abandon", [None, lambda token_ids, logprobs: False], ids=["plain", "streamed"])
def test_cancelling_leaves_nothing_running(vllm_server, engine, prompts, abandon):
    async def scenario():
        calls = [asyncio.ensure_future(engine.generate(p, max_tokens=900, abandon=abandon)) for p in prompts]
        assert await asyncio.to_thread(until, lambda: open_requests(vllm_server.url) >= 16, seconds=20)
        before = generated_tokens(vllm_server.url)  # in this thread: the calls are cancelled before others run
        for call in calls:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) >= 16
        assert await asyncio.to_thread(until, lambda: open_requests(vllm_server.url) == 0, seconds=5)
        assert generated_tokens(vllm_server.url) - before < 40 * 64  # to their ends it would be 160 each

    asyncio.run(scenario())


def test_errors_of_an_abandon_rule_reach_the_caller(engine, prompts):
    def broken(token_ids, logprobs) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(engine.generate(prompts[0], max_tokens=20, abandon=broken))


# Many calls, several loops


def test_seeds_make_calls_reproducible_in_any_company(engine, prompts):
    def calls(number):
        return [engine.generate(p, max_tokens=40, seed=2**63 + i) for i, p in enumerate(prompts[:number])]

    first = run(*calls(12), *(engine.generate(p, max_tokens=20) for p in prompts[:20]))
    again = run(*calls(12))
    assert [g.token_ids for g in first[:12]] == [g.token_ids for g in again]
    (other,) = run(engine.generate(prompts[0], max_tokens=40, seed=77))
    assert other.token_ids != again[0].token_ids


def test_many_calls_in_one_loop_after_another_leave_nothing_open(vllm_server, tokenizer, prompts):
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    engine = VLLMServerEngine(vllm_server.url, tokenizer, max_connections=200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        before = descriptors()
        for number in (64, 256):
            results = run(*(engine.generate(prompts[i % 64], max_tokens=5, seed=i) for i in range(number)))
            assert len(results) == number
            assert all(1 <= len(generation.token_ids) <= 5 for generation in results)
        assert descriptors() <= before
        assert not engine._client._sessions
    assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)] == []


@pytest.mark.parametrize("speculative", [False, True], ids=["pausing", "speculative"])
def test_sampled_rollouts_are_well_formed(engine, tokenizer, prompts, speculative):
    rollout = DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], SamplingParams(256), speculative)
    records = rollout.run(prompts[:32], seeds=range(32))
    for record in records:
        assert_well_formed(record, tokenizer, max_tokens=256)
    assert sum(record.truncated for record in records) > 8


@pytest.mark.parametrize("sample_ahead", [False, True], ids=["a request per segment", "ahead"])
def test_speculation_changes_no_token(vllm_server, tokenizer, prompts, sample_ahead):
    """In greedy sampling also if a thought is one request; with sampling, seeds belong to requests."""
    engine = VLLMServerEngine(vllm_server.url, tokenizer, sample_ahead=sample_ahead)

    def roll_out(speculative: bool):
        callback = ConfidenceTruncation(tokenizer)
        sampling = SamplingParams(256, temperature=0.0 if sample_ahead else 1.0)
        rollout = DynamicTruncatedRollout(engine, [callback], sampling, speculative)
        return rollout.run(prompts[:32], seeds=range(32))

    pausing, speculative = roll_out(False), roll_out(True)
    differences = sum(a.completion_ids != b.completion_ids for a, b in zip(pausing, speculative, strict=True))
    assert len(pausing) == 32
    assert differences == 0
    outcomes = [probe.outcome for record in speculative for probe in record.probes]
    assert outcomes.count("exit") > 8 and "abandoned" in outcomes


# Sampling ahead


async def in_segments(engine, prompt, stop, max_tokens, **options) -> list[Generation]:
    """The calls of a rollout that continues after each stop string."""
    segments: list[Generation] = []
    async with engine.for_rollout(prompt) as bound:
        path, left = list(prompt), max_tokens
        while left and (not segments or segments[-1].finish_reason == "stop"):
            segments.append(await bound.generate(path, max_tokens=left, stop=stop, ahead=True, **options))
            path, left = path + segments[-1].token_ids, left - len(segments[-1].token_ids)
    return segments


@pytest.mark.parametrize("interval", [1, 7, 16])
def test_a_thought_in_segments_is_the_whole_thought(vllm_server, tokenizer, prompts, wholes, interval):
    engine = VLLMServerEngine(vllm_server.url, tokenizer, ahead_interval=interval)
    pieces, stop = token_bytes(tokenizer), (*TRIGGERS, " = 1")
    rollouts = run(*(in_segments(engine, p, stop, 200, seed=i) for i, p in enumerate(prompts[:16])))
    for whole, segments in zip(wholes[:16], rollouts, strict=True):
        assert [i for segment in segments for i in segment.token_ids] == whole.token_ids
        logprobs = [logprob for segment in segments for logprob in segment.logprobs]
        assert logprobs == pytest.approx(whole.logprobs, abs=1e-4)
        assert segments[-1].finish_reason == whole.finish_reason
        for segment in segments:
            text = b"".join(pieces[i] for i in segment.token_ids)
            before = b"".join(pieces[i] for i in segment.token_ids[:-1])
            assert not any(string.encode() in before for string in stop)
            ends_in_stop = any(string.encode() in text for string in stop)
            assert ends_in_stop == (segment.finish_reason == "stop")
    assert sum(len(segments) >= 4 for segments in rollouts) >= 8


def test_what_was_sampled_ahead_serves_only_the_call_that_goes_on(engine, prompts):
    """Another temperature, another path or a larger budget starts a new request, as if there had been none before."""
    stop, prompt = TRIGGERS, prompts[1]

    async def scenario(change):
        async with engine.for_rollout(prompt) as bound:
            first = await bound.generate(prompt, max_tokens=200, stop=stop, temperature=0.0, ahead=True)
            assert first.finish_reason == "stop"
            options = {"max_tokens": 20, "temperature": 0.0, "stop": ()} | change([*prompt, *first.token_ids])
            return options, await bound.generate(**options, ahead=True)

    changes = [
        lambda path: {"prompt_ids": path},
        lambda path: {"prompt_ids": path, "temperature": 1.0, "seed": 5},
        lambda path: {"prompt_ids": [*path[:-1], 40]},
        lambda path: {"prompt_ids": path, "max_tokens": 400},
    ]
    for change in changes:
        options, generation = asyncio.run(scenario(change))
        (expected,) = run(engine.generate(**options))
        assert generation.token_ids == expected.token_ids


@pytest.mark.parametrize("how", ["left", "cancelled"])
def test_what_was_sampled_ahead_ends_with_its_rollout(vllm_server, engine, prompts, how):
    async def rollout(prompt):
        async with engine.for_rollout(prompt) as bound:
            first = await bound.generate(prompt, max_tokens=900, stop=("+",), temperature=0.0, ahead=True)
            if how == "cancelled":
                path = [*prompt, *first.token_ids]
                await bound.generate(path, max_tokens=850, stop=("no such text",), ahead=True, temperature=0.0)

    async def scenario():
        before = await asyncio.to_thread(generated_tokens, vllm_server.url)
        tasks = [asyncio.ensure_future(rollout(prompt)) for prompt in prompts]
        if how == "cancelled":
            assert await asyncio.to_thread(until, lambda: open_requests(vllm_server.url) >= 32, seconds=20)
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.to_thread(until, lambda: open_requests(vllm_server.url) == 0, seconds=5)
        assert generated_tokens(vllm_server.url) - before < 80 * 64  # to their ends it would be 160 each

    asyncio.run(scenario())


# Servers that are wrong, or away


def test_check_accepts_the_server_that_we_start(engine, caplog):
    with caplog.at_level(logging.WARNING):
        run(engine.check(max_length=1024))
    assert caplog.text == ""


def test_check_names_what_is_wrong(vllm_server, engine, tokenizer):
    with pytest.raises(EngineError, match=r"max_length: .* up to 1025 tokens, .* takes 1024.*--max-model-len 1025"):
        run(engine.check(max_length=1025))
    named = VLLMServerEngine(vllm_server.url, tokenizer, model="another")
    with pytest.raises(EngineError, match=r"model: .* does not serve 'another', but .*testbed/model"):
        run(named.check())
    with pytest.raises(EngineError, match="`another` does not exist"):
        run(named.generate([5], max_tokens=1))
    with pytest.raises(EngineError, match=r"tokenizer: .* has another tokenizer"):
        run(VLLMServerEngine(vllm_server.url, trained()).check())


def test_check_compares_the_size_of_the_model_with_the_policy_s(engine, model):
    run(engine.check(policy_config=model.config))
    for name, size in {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936}.items():
        other = copy.deepcopy(model.config)
        setattr(other, name, size)
        ours = getattr(model.config, name)
        with pytest.raises(
            EngineError, match=rf"model: .* another size.*: .*{name} {ours}.* instead of .*{name} {size}"
        ):
            run(engine.check(policy_config=other))


def test_a_model_that_cannot_be_read_here_is_not_compared(engine, model, tmp_path, caplog):
    """For example, on a server on another machine. Its weights are compared after the first synchronisation."""
    with caplog.at_level(logging.WARNING):
        ServerChecks(engine._servers[0], engine._client).size(str(tmp_path / "elsewhere"), model.config)
    assert "elsewhere', whose configuration cannot be read here: its size is not compared" in caplog.text


def test_check_says_how_a_server_is_started_that_receives_weights(vllm_server, mortal_server, tokenizer):
    """One server has a weight-transfer engine, the other has none."""
    run(VLLMServerEngine(vllm_server.url, tokenizer).check(weight_sync="nccl"))
    without_engine = VLLMServerEngine(mortal_server.url, tokenizer)
    run(without_engine.check(weight_sync="disk"))
    with pytest.raises(
        EngineError, match=r"weight_sync: .*--weight-transfer-config '{\"backend\": \"nccl\"}'.*'disk'"
    ):
        run(without_engine.check(weight_sync="nccl"))
    # A server without development mode answers as any does to a path that it does not have.
    server = Server(f"{vllm_server.url}/no-such-path")
    for weight_sync in ("nccl", "disk"):
        with pytest.raises(EngineError, match=r"weight_sync: .* lacks the endpoints.*VLLM_SERVER_DEV_MODE=1"):
            run(ServerChecks(server, without_engine._client).weight_sync(weight_sync))


def test_refused_calls_say_why(engine):
    with pytest.raises(EngineError, match="max_tokens=2000 cannot be greater than max_model_len"):
        run(engine.generate([5], max_tokens=2000))
    with pytest.raises(ValueError, match="prompt_ids: is empty"):
        run(engine.generate([], max_tokens=1))


def test_an_unreachable_server_is_given_up_after_the_window(tokenizer, caplog):
    port = free_port()
    engine = VLLMServerEngine(f"http://127.0.0.1:{port}", tokenizer, api_key=KEY, retry_window=1.0)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(EngineUnavailableError) as caught:
        run(engine.generate([5], max_tokens=1))
    assert 1.0 <= time.monotonic() - started < 10
    message = str(caught.value)
    for part in (
        f"http://127.0.0.1:{port}",
        "attempts in 1 s",
        "step-trl serve",
        f"--port {port}",
        "processed_logprobs",
    ):
        assert part in message
    assert len(caplog.records) == 1 and "trying again" in caplog.text
    assert KEY not in message + caplog.text + repr(engine) + repr(caught.value)


def test_a_key_is_needed_and_never_shown_and_check_finds_wrong_flags(guarded, tokenizer, caplog):
    assert KEY not in guarded.command_line
    for key in (None, "sk-wrong"):
        engine = VLLMServerEngine(guarded.url, tokenizer, api_key=key)
        with pytest.raises(EngineError, match=r"api_key: .* refuses the call .status 401") as caught:
            run(engine.generate([5], max_tokens=1))
        assert "sk-wrong" not in str(caught.value) + repr(engine)
    engine = VLLMServerEngine(guarded.url + "/v1", tokenizer, api_key=KEY)
    with caplog.at_level(logging.DEBUG):
        (generation,) = run(engine.generate([5], max_tokens=3))
        assert len(generation.token_ids) <= 3
        with pytest.raises(EngineError, match=r"logprobs: .*--logprobs-mode processed_logprobs"):
            run(engine.check())
        run(ServerChecks(engine._servers[0], engine._client).prefix_cache())
    assert "--enable-prefix-caching" in caplog.text
    assert KEY not in caplog.text + repr(engine) + repr(vars(engine._servers[0]))


def test_a_call_outlasts_the_death_of_its_server(guarded, tokenizer, prompts, caplog, tmp_path, preloaded_executable):
    """After SIGKILL in a call, `step-trl serve` takes over the port and gets the last weights. SIGTERM ends it."""
    policy = testbed.load_model()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    policy.save_pretrained(tmp_path)
    engine = VLLMServerEngine(guarded.url, tokenizer, api_key=KEY, retry_window=240)
    abandon = [None, lambda token_ids, logprobs: False]
    command = [
        preloaded_executable,
        "-c",
        "from step_trl.cli.main import main; main()",
        "serve",
        str(testbed.MODEL_DIR),
        "--port",
        str(guarded.port),
    ]
    command += ["--max-model-len", "512"]
    successor = None

    async def scenario():
        nonlocal successor
        originals = [await engine.generate(p, max_tokens=60, temperature=0.0) for p in prompts[:4]]
        await engine.load_weights(tmp_path)
        wholes = [await engine.generate(p, max_tokens=60, temperature=0.0) for p in prompts[:4]]
        assert all(a.token_ids != b.token_ids for a, b in zip(originals, wholes))
        options = {"max_tokens": 300, "temperature": 0.0}
        calls = [
            asyncio.ensure_future(engine.generate(p, abandon=abandon[i % 2], **options))
            for i, p in enumerate(prompts[:4])
        ]
        assert await asyncio.to_thread(until, lambda: open_requests(guarded.url) > 0, seconds=20)
        await asyncio.to_thread(guarded.kill)
        successor = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_API_KEY": KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return wholes, await asyncio.gather(*calls)

    try:
        with caplog.at_level(logging.WARNING):
            wholes, generations = asyncio.run(scenario())
        for whole, generation in zip(wholes, generations, strict=True):
            assert generation.finish_reason in ("eos", "length")
            assert len(generation.token_ids) == len(generation.logprobs) <= 300
            assert generation.token_ids[:60] == whole.token_ids
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 3 and "does not answer" in messages[0] and "answers again" in messages[2]
        assert f"told to load {tmp_path} again" in messages[1]
        assert KEY not in caplog.text
    finally:
        if successor is not None:
            successor.send_signal(signal.SIGTERM)
            output, _ = successor.communicate(timeout=60)
    assert successor.returncode == 0
    assert f"at {guarded.url}" in output and "--logprobs-mode processed_logprobs" in output
    assert KEY not in output
    with pytest.raises(OSError):
        open_requests(guarded.url)


# Without a server


def test_pieces_are_cut_where_the_stop_string_ends(tokenizer):
    """For any chunks of tokens, with tokens after the stop string and ids that the tokenizer does not have."""
    ids = [9999, *tokenizer.encode("12 + 3.\n\nWait, Wait", add_special_tokens=False), 9999]
    pieces = token_bytes(tokenizer)
    stops = StopStrings(tokenizer, max(tokenizer.get_vocab().values()) + 2)
    for stop in ("Wait", "Wait,", "3.\n\nWa", "\n", "+"):
        text, end = b"", 1
        while stop.encode() not in text:
            text, end = text + pieces[ids[end]], end + 1
        for width in range(1, len(ids) + 1):
            sampled = Sampled(stops, stops.index((stop,)))
            for start in range(0, len(ids), width):
                part = ids[start : start + width]
                last = start + width >= len(ids)
                logprobs = TokenLogprobs([-0.5] * len(part))
                generation = sampled.add(Choice(part, logprobs, "length" if last else None, None))
                if generation is not None:
                    break
            assert generation == Generation(ids[:end], [-0.5] * end, "stop")


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "expected"),
    [
        ("stop", None, "eos"),
        ("stop", 2, "eos"),
        ("stop", "Wait", "stop"),
        ("length", None, "length"),
        (None, None, None),
    ],
)
def test_finish_reasons_of_the_server(tokenizer, finish_reason, stop_reason, expected):
    sampled = Sampled(StopStrings(tokenizer, len(tokenizer) + 1), 0)
    generation = sampled.add(Choice([5], TokenLogprobs([-0.5]), finish_reason, stop_reason))
    assert (generation and generation.finish_reason) == expected
    with pytest.raises(ConnectionLostError, match="abort"):
        sampled.add(Choice([5], TokenLogprobs([-0.5]), "abort", None))


def test_verification_options_reach_the_connection(tokenizer):
    async def connector_of(**options):
        engine = VLLMServerEngine("https://models.example/v1/", tokenizer, **options)
        assert engine._servers[0].url == "https://models.example"
        return (await engine._client._session()).http.connector

    context = ssl.create_default_context()
    assert asyncio.run(connector_of())._ssl is True
    assert asyncio.run(connector_of(verify=False))._ssl is False
    assert asyncio.run(connector_of(verify=context))._ssl is context
    bundle = ssl.get_default_verify_paths().openssl_cafile
    with_file = asyncio.run(connector_of(verify=bundle))._ssl if os.path.exists(bundle) else context
    assert isinstance(with_file, ssl.SSLContext)
    with pytest.raises(FileNotFoundError):
        asyncio.run(connector_of(verify="no/such/file.pem"))


def test_calls_of_a_prompt_share_a_server(tokenizer, prompts):
    urls = [f"http://127.0.0.1:{port}" for port in (8001, 8002, 8003)]
    engine, other = VLLMServerEngine(urls, tokenizer), VLLMServerEngine(urls, tokenizer)

    async def scenario():
        chosen = []
        for prompt in prompts:
            async with engine.for_rollout(prompt) as bound, other.for_rollout(prompt) as same:
                url = bound._server_of(prompt).url
                assert same._server_of(prompt).url == url  # as in another process
                assert all(bound._server_of([*prompt, *path]).url == url for path in ([5], [6, 7], [8] * 50))
                chosen.append(url)
        return chosen

    chosen = asyncio.run(scenario())
    assert min(chosen.count(url) for url in urls) >= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url: '127.0.0.1:8000' is not an http or https URL"),
        ({"base_url": "http://user:secret@host"}, "base_url: contains a user name or password"),
        ({"base_url": []}, "base_url: is empty"),
        ({"base_url": "http://host", "stream_interval": 0}, "stream_interval: 0 is not a number"),
        ({"base_url": "http://host", "ahead_interval": 0}, "ahead_interval: 0 is not a number"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        VLLMServerEngine(tokenizer=tokenizer, **arguments)
    assert "secret" not in str(caught.value)


def test_server_command_has_the_flags_that_rollouts_need():
    command, environment = server_command("m", port=1234, max_model_len=99, extra_arguments=["--seed", "1"], cpu=True)
    assert command[:6] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--host"]
    assert command[-2:] == ["--seed", "1"]
    for flags in ("--host 127.0.0.1", "--port 1234", "--max-model-len 99", "--max-num-batched-tokens 32768"):
        assert flags in " ".join(command)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    command, environment = server_command("m", host="0.0.0.0")
    assert "--dtype" not in command and environment == {}
