"""A batch that is sampled in the background: who gets it, and what becomes of it otherwise."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from rollout.scripted_engine import ScriptedEngine

from step_trl.monitor import RunStatus
from step_trl.rollout import DynamicTruncatedRollout, SamplingParams
from step_trl.runtime.rollouts_ahead import Request, RolloutsAhead


class SlowEngine(ScriptedEngine):
    """Waits until it may sample."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, {5: 1.0, 6: 1.0})
        self.may_sample, self.error = threading.Event(), None

    async def generate(self, prompt_ids, **options):
        self.running += 1
        try:
            while not self.may_sample.is_set():
                await asyncio.sleep(0.005)
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        return await super().generate(prompt_ids, **options)


REQUEST = Request([[1, 2], [1, 3]], [7, 8])


@pytest.fixture
def engine(tokenizer):
    return SlowEngine(tokenizer)


@pytest.fixture
def status():
    return RunStatus("method", {})


@pytest.fixture
def ahead(engine, status):
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=3))
    ahead = RolloutsAhead(trainer)
    ahead.start(REQUEST, DynamicTruncatedRollout(engine, sampling=SamplingParams(4)), status)
    trainer.state.global_step = 4
    yield ahead
    ahead.cancel()


def test_the_batch_is_taken_once(ahead, engine, status):
    engine.may_sample.set()
    rollouts = ahead.take(Request([[1, 2], [1, 3]], [7, 8], [], False))
    assert [len(rollout.completion_ids) for rollout in rollouts] == [4, 4] and ahead.staleness == 1
    assert (status.rollouts, status.ended) == (2, 2) and status.tokens_per_second > 0
    assert ahead.take(REQUEST) is None and ahead.staleness == 0


@pytest.mark.parametrize(
    "other",
    [
        Request([[1, 2], [1, 4]], [7, 8]),
        Request([[1, 2], [1, 3]], [7, 9]),
        Request([[1, 2], [1, 3]], [7, 8], speculative=True),
        Request([[1, 2], [1, 3]], [7, 8], callbacks=[object()]),
    ],
)
def test_another_request_does_not_get_it(other, ahead, engine, caplog):
    engine.may_sample.set()
    assert ahead.take(other) is None and ahead.staleness == 0
    assert "It is sampled again" in caplog.text


def test_settling_waits_and_keeps_the_batch(ahead, engine):
    threading.Timer(0.1, engine.may_sample.set).start()
    ahead.settle()
    assert engine.running == 0
    assert len(ahead.take(REQUEST)) == 2


def test_an_error_is_raised_when_the_batch_is_needed(ahead, engine):
    engine.error = ZeroDivisionError("in the background")
    engine.may_sample.set()
    with pytest.raises(ZeroDivisionError, match="in the background"):
        ahead.take(REQUEST)
    assert ahead.take(REQUEST) is None


def test_cancelling_ends_what_runs(ahead, engine):
    ahead.cancel()
    assert engine.running == 0 and engine.sampled_tokens == 0
    assert ahead.take(REQUEST) is None
    ahead.cancel()  # nothing is left to cancel


def test_listeners_hear_of_rollouts_only_while_the_training_waits(ahead, engine, status):
    heard = []
    status.listeners.append(lambda: heard.append(status.phase))
    status.enter("update")
    engine.may_sample.set()
    ahead.settle()
    assert status.ended == 2 and heard == ["update"]
