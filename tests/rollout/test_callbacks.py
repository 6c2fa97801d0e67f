"""The truncation callbacks of the package, one of a user's own, and several together, on a scripted engine."""

import math

import pytest
from rollout.scripted_engine import ScriptedEngine
from rollout.test_dynamic import PAPER_PROMPT, build, check_invariants, piece_ids, tokenizer  # noqa: F401

from step_trl.rollout import (
    AnswerConsistency,
    DynamicTruncatedRollout,
    Exit,
    GoOn,
    RandomCut,
    SamplingParams,
    TokenBudget,
    TruncationCallback,
)
from step_trl.steps import TriggerSegmenter


CLOSING = "\n</think>\n\n"
BUDGET = 60


@pytest.fixture
def run(tokenizer):  # noqa: F811
    def run(*callbacks, number=60, max_tokens=BUDGET, speculative=True, seeds=None, salt=2, certain=0.8):
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt, certain)
        prompts = [tokenizer.encode(str(i)) for i in range(number)]
        rollout = DynamicTruncatedRollout(engine, callbacks, SamplingParams(max_tokens), speculative)
        records = rollout.run(prompts, seeds)
        assert engine.running == 0
        for record in records:
            check_invariants(engine, record, max_tokens)
        return records

    return run


def thought_length(tokenizer, record):  # noqa: F811
    """Tokens before the end of the thought or of the completion."""
    ends = (tokenizer.convert_tokens_to_ids("</think>"), tokenizer.eos_token_id)
    return next((place for place, index in enumerate(record.completion_ids) if index in ends), BUDGET)


def test_a_callback_that_always_goes_on_changes_nothing(run):
    class Watcher(TruncationCallback):
        triggers = ("Wait",)
        seen = 0

        def positions(self, prompt_ids, max_tokens, seed):
            return range(0, max_tokens, 7)

        def at_boundary(self, boundary):
            assert boundary.path_ids and boundary.remaining > 0
            Watcher.seen += 1
            return GoOn()

    assert [r.completion_ids for r in run(Watcher())] == [r.completion_ids for r in run()]
    assert Watcher.seen > 100


def test_a_callback_of_ones_own(run, tokenizer):  # noqa: F811
    class StopAtThirdDoubt(TruncationCallback):
        triggers = ("Wait",)

        def __init__(self, tokenizer):
            self.closing_ids = tokenizer.encode(CLOSING, add_special_tokens=False)

        def at_boundary(self, boundary):
            return Exit(keep_trigger=False, closing_ids=self.closing_ids) if boundary.number == 2 else GoOn()

    callback, segmenter = StopAtThirdDoubt(tokenizer), TriggerSegmenter(tokenizer, ("Wait",))
    truncated = [record for record in run(callback) if record.truncated]
    assert len(truncated) > 10
    for record in truncated:
        cut = record.injected.index(True)
        assert record.completion_ids[cut : cut + len(callback.closing_ids)] == callback.closing_ids
        assert segmenter.count(record.completion_ids[:cut]) <= 2  # "Wait" was a word until a letter followed


def test_token_budget(run, tokenizer):  # noqa: F811
    plain, cut = run(), run(TokenBudget(tokenizer, 12))
    closing = tokenizer.encode(CLOSING, add_special_tokens=False)
    assert 10 < sum(record.truncated for record in cut)
    for whole, record in zip(plain, cut):
        if thought_length(tokenizer, whole) < 12:
            assert record.completion_ids == whole.completion_ids and not record.truncated
        else:
            assert record.completion_ids[: 12 + len(closing)] == whole.completion_ids[:12] + closing


def test_random_cut(run, tokenizer):  # noqa: F811
    callback = RandomCut(tokenizer, shortest=5, longest=30, closing=CLOSING)
    records = run(callback, number=200, seeds=range(200))
    cuts = [record.injected.index(True) for record in records if record.truncated]
    assert min(cuts) >= 5 and max(cuts) <= 30 and len(set(cuts)) > 15
    again = run(callback, number=200, seeds=range(200))
    assert [r.completion_ids for r in again] == [r.completion_ids for r in records]


@pytest.mark.parametrize("every", [None, 2])
def test_answer_consistency_stops_at_the_first_window_that_agrees(run, tokenizer, every):  # noqa: F811
    callback = AnswerConsistency(tokenizer, every=every, window=2, answer_prompt=PAPER_PROMPT, max_probe_tokens=3)
    four, wait = tokenizer.encode("4")[0], tokenizer.convert_tokens_to_ids("ĠWait")
    # Few different tokens, so that answers sometimes agree.
    engine = ScriptedEngine(tokenizer, {four: 1.0, wait: 1.5, tokenizer.eos_token_id: 0.8}, max_delay=0)
    prompts = [tokenizer.encode(str(i)) for i in range(400)]
    records = DynamicTruncatedRollout(engine, [callback], SamplingParams(BUDGET)).run(prompts)
    agreed = 0
    for record in records:
        answers = [tokenizer.decode(p.token_ids, skip_special_tokens=True).strip() for p in record.probes]
        ended = [p.token_ids[-1] == tokenizer.eos_token_id for p in record.probes]
        pairs = [a == b != "" and e for a, b, e in zip(answers, answers[1:], ended[1:])]
        assert pairs.count(True) == record.truncated
        assert not any(pairs[:-1])
        if every is not None:
            assert [p.position for p in record.probes] == [every * (i + 1) for i in range(len(answers))]
        agreed += record.truncated
    assert agreed > 2


@pytest.mark.parametrize("speculative", [False, True])
def test_the_first_callback_that_says_stop_decides(run, tokenizer, speculative):  # noqa: F811
    confidence = build(tokenizer, {})
    alone = run(confidence, speculative=False)
    both = run(confidence, TokenBudget(tokenizer, 15), speculative=speculative)
    stopped_early = over_budget = 0
    for first, record in zip(alone, both):
        left_at = first.injected.index(True) if first.truncated else math.inf
        if left_at <= 15:
            assert record.completion_ids == first.completion_ids
            stopped_early += 1
        elif thought_length(tokenizer, first) >= 15:
            assert record.truncated and record.injected.index(True) == 15
            over_budget += 1
    assert stopped_early > 3 and over_budget > 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: TokenBudget(t, 0), "budget: 0"),
        (lambda t: TokenBudget(t, 9, closing="Stop."), "closing: 'Stop.' leaves the thought open"),
        (lambda t: RandomCut(t, shortest=9, longest=4), "shortest, longest: no length is between 9 and 4"),
        (lambda t: AnswerConsistency(t, window=1), "window: 1 is too small"),
        (lambda t: AnswerConsistency(t, every=0), "every: 0 is too small"),
    ],
)
def test_bad_options_are_named(tokenizer, make, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make(tokenizer)
