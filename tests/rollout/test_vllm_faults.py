"""Rollouts on real vLLM servers that die, connections that stall or break, and users who lose patience."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from preloaded import PreloadedPython
from rollout.faulty_proxy import END_OF_STREAM, Fate, FaultyProxy
from rollout.server_metrics import generated_tokens, open_requests, until
from rollout.well_formed import assert_well_formed

from step_trl import testbed
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import VLLMServerEngine


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    problems = testbed.load_dataset("train").select(range(64))["prompt"]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]


@pytest.fixture(scope="module")
def greedy_rollouts(tokenizer, prompts):
    """`greedy_rollouts(engine, 32)`: truncated rollouts of the first prompts, whose correct result is known."""

    def greedy_rollouts(engine, number, copies=1):
        sampling = SamplingParams(160, temperature=0.0)
        rollout = DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], sampling)
        records = rollout.run([prompt for prompt in prompts[:number] for _ in range(copies)])
        for record in records:
            assert_well_formed(record, tokenizer, max_tokens=160)
        return records

    return greedy_rollouts


@pytest.fixture(scope="module")
def undisturbed(vllm_server, tokenizer, greedy_rollouts):
    """What 32 prompts have on a server to which connections hold."""
    return greedy_rollouts(VLLMServerEngine(vllm_server.url, tokenizer), 32)


def assert_same(records, undisturbed, key=lambda record: record.completion_ids):
    """Check that rollouts are the same, except for one, which rounding in other batches may have changed."""
    assert len(records) == len(undisturbed)
    assert sum(key(record) != key(other) for record, other in zip(records, undisturbed)) <= 1


# A server dies


def test_rollouts_outlast_the_death_of_their_server(mortal_server, greedy_rollouts, tokenizer, prompts, caplog):
    """After SIGKILL and a new server on the port, each prompt has its completions, as if nothing had happened."""
    engine = VLLMServerEngine(mortal_server.url, tokenizer, retry_window=240)
    begun = generated_tokens(mortal_server.url)
    undisturbed = greedy_rollouts(engine, 8, copies=4)
    total = generated_tokens(mortal_server.url) - begun

    def in_the_middle() -> bool:
        url = mortal_server.url
        return generated_tokens(url) - begun > 1.3 * total and open_requests(url) >= 8

    def kill_and_start_again() -> None:
        assert until(in_the_middle, seconds=60)
        mortal_server.kill()
        mortal_server.start()

    with caplog.at_level(logging.WARNING, logger="step_trl"), ThreadPoolExecutor(1) as executor:
        killing = executor.submit(kill_and_start_again)
        records = greedy_rollouts(engine, 8, copies=4)
        killing.result(timeout=240)
    assert [record.prompt_ids for record in records] == [prompt for prompt in prompts[:8] for _ in range(4)]
    assert_same(records, undisturbed)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("step_trl")]
    assert len(messages) == 2, messages
    assert f"{mortal_server.url} does not answer" in messages[0]
    assert f"{mortal_server.url} answers again" in messages[1]
    assert until(lambda: open_requests(mortal_server.url) == 0, seconds=5)


# A connection stalls or breaks


@pytest.mark.parametrize("abandon", [None, lambda token_ids, logprobs: False], ids=["plain", "streamed"])
def test_a_stuck_call_holds_no_other(vllm_server, tokenizer, prompts, abandon):
    """The others end before its time-out is over; then it is tried again."""
    options = {"max_tokens": 100, "temperature": 0.0, "abandon": abandon}

    async def calls(engine):
        started = time.monotonic()

        async def timed(prompt):
            generation = await engine.generate(prompt, **options)
            return time.monotonic() - started, generation

        return await asyncio.gather(*(timed(prompt) for prompt in prompts[:16]))

    direct = VLLMServerEngine(vllm_server.url, tokenizer)
    asyncio.run(calls(direct))  # the first requests are slow
    undisturbed = asyncio.run(calls(direct))
    patience = max(2.0, 4 * max(seconds for seconds, _ in undisturbed))
    pieces: list[bytes] = []

    def third_is_stuck(number: int, piece: bytes) -> Fate:
        if number == 3:
            pieces.append(piece)
        return "stall" if number == 3 and (abandon is None or len(pieces) > 1) else "forward"

    with FaultyProxy(vllm_server.url, third_is_stuck) as proxy:
        timed_calls = asyncio.run(calls(VLLMServerEngine(proxy.url, tokenizer, read_timeout=patience)))
    assert proxy.fates == [(3, "stall")]
    seconds = sorted(seconds for seconds, _ in timed_calls)
    assert seconds[14] < patience < seconds[15]
    assert_same(timed_calls, undisturbed, key=lambda call: (call[1].token_ids, call[1].finish_reason))


def test_a_stuck_thought_holds_no_other(vllm_server, greedy_rollouts, undisturbed, tokenizer):
    """Nor does it block a run: it is tried again after its time-out."""

    def third_is_stuck(number: int, piece: bytes) -> Fate:
        return "stall" if number == 3 and b"data: " in piece and b"HTTP/1.1" not in piece else "forward"

    with FaultyProxy(vllm_server.url, third_is_stuck) as proxy:
        records = greedy_rollouts(VLLMServerEngine(proxy.url, tokenizer, read_timeout=2.0), 32)
    assert proxy.fates == [(3, "stall")]
    assert_same(records, undisturbed)


def test_unread_thoughts_leave_connections_to_their_probes(vllm_server, tokenizer, prompts):
    """A long thought that is not read blocks in its connection's buffers, here after its first pieces."""
    pieces: Counter[int] = Counter()

    def thoughts_stop(number: int, piece: bytes) -> Fate:
        pieces[number] += b"data: {" in piece
        return "stall" if pieces[number] > 2 else "forward"

    async def roll_out(engine: VLLMServerEngine, prompt: list[int]) -> str:
        async with engine.for_rollout(prompt) as on_server:
            segment = await on_server.generate(prompt, max_tokens=200, stop=("=",), ahead=True)
            probe = await on_server.generate(prompt + segment.token_ids, max_tokens=4, temperature=0.0)
            assert len(probe.token_ids) == 4
            return segment.finish_reason

    async def roll_all_out(engine: VLLMServerEngine) -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*(roll_out(engine, prompt) for prompt in prompts[:16])), 60)

    with FaultyProxy(vllm_server.url, thoughts_stop) as proxy:
        engine = VLLMServerEngine(proxy.url, tokenizer, max_connections=4)
        assert asyncio.run(roll_all_out(engine)) == ["stop"] * 16


def test_connections_that_break_change_no_rollout(vllm_server, greedy_rollouts, undisturbed, tokenizer, caplog):
    """The server is the same process as before, so it need not load its weights again."""

    def every_fifth_breaks(number: int, piece: bytes) -> Fate:
        return "cut" if number % 5 == 0 and b"HTTP/1.1" not in piece else "forward"

    with FaultyProxy(vllm_server.url, every_fifth_breaks) as proxy:
        engine = VLLMServerEngine(proxy.url, tokenizer)
        asyncio.run(engine.load_weights(testbed.MODEL_DIR))
        with caplog.at_level(logging.WARNING, logger="step_trl"):
            records = greedy_rollouts(engine, 32)
    assert len(proxy.fates) >= 6
    assert "answers again" in caplog.text and "told to load" not in caplog.text
    assert_same(records, undisturbed)


def test_a_connection_that_breaks_behind_the_last_token_fails_no_rollout(
    vllm_server, greedy_rollouts, undisturbed, tokenizer
):
    """All tokens have arrived, but not the end of their stream."""

    def end_is_lost(number: int, piece: bytes) -> Fate:
        return "cut" if piece.startswith(END_OF_STREAM) and len(proxy.fates) < 32 else "forward"

    with FaultyProxy(vllm_server.url, end_is_lost) as proxy:
        records = greedy_rollouts(VLLMServerEngine(proxy.url, tokenizer), 32)
    assert len(proxy.fates) >= 4
    assert_same(records, undisturbed)


# A user loses patience


def test_ctrl_c_ends_a_script_and_its_requests(vllm_server, tmp_path):
    script = Path(__file__).with_name("interrupted_rollouts.py")
    before = generated_tokens(vllm_server.url)
    process = PreloadedPython([str(script), vllm_server.url], tmp_path / "output")
    try:
        assert until(lambda: open_requests(vllm_server.url) >= 32, seconds=120)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert (tmp_path / "output").read_text().splitlines()[-1] == "KeyboardInterrupt"
    assert until(lambda: open_requests(vllm_server.url) == 0, seconds=5)
    assert generated_tokens(vllm_server.url) - before < 80 * 64  # to their ends it would be 200 each


def test_the_stop_button_of_a_notebook_ends_its_requests(vllm_server, tokenizer, prompts, greedy_rollouts):
    """
    A Jupyter kernel runs a cell inside its loop, which no `asyncio.run` has started, and is sent SIGINT while the
    default handler is set: KeyboardInterrupt is raised where the cell waits.
    """
    engine = VLLMServerEngine(vllm_server.url, tokenizer)
    rollout = DynamicTruncatedRollout(engine, [], SamplingParams(900))
    undisturbed = greedy_rollouts(engine, 8)

    async def cell():
        rollout.run(prompts)

    def press_stop() -> bool:
        requests_came = until(lambda: open_requests(vllm_server.url) >= 32, seconds=20)
        os.kill(os.getpid(), signal.SIGINT)
        return requests_came

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads, tokens = threading.enumerate(), generated_tokens(vllm_server.url)
    kernel = asyncio.new_event_loop()
    try:
        with ThreadPoolExecutor(1) as executor:
            stopping = executor.submit(press_stop)
            with pytest.raises(KeyboardInterrupt):
                kernel.run_until_complete(cell())
            assert stopping.result(timeout=30)
        assert threading.enumerate() == threads
        assert until(lambda: open_requests(vllm_server.url) == 0, seconds=5)
        assert generated_tokens(vllm_server.url) - tokens < 80 * 64  # to their ends it would be 200 each
        assert not engine._client._sessions

        async def next_cell():
            return greedy_rollouts(engine, 8)

        assert_same(kernel.run_until_complete(next_cell()), undisturbed)
    finally:
        signal.signal(signal.SIGINT, inherited)
        kernel.close()
