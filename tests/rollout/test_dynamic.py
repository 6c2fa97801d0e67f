"""The dynamic truncated rollout against a token-by-token oracle, on a scripted engine."""

import asyncio
import gc
import itertools
import math
import random
import re
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout.scripted_engine import ScriptedEngine
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from step_trl.rollout import (
    ConfidenceTruncation,
    DynamicTruncatedRollout,
    GoOn,
    SamplingParams,
    TokenBudget,
    TruncationCallback,
)
from step_trl.rollout.engines import EngineError
from step_trl.steps import TriggerSegmenter


# Triggers whole, inside a token, over several tokens, glued to letters; bytes of one character; the tags.
PIECES = ["Wait", "Wait,", "Waiting", " Wait", "Alter", "natively", "Alternatively", "ing", "a", "W", "ait", " b"]
PIECES += [".", "\n\n", ".\n\n", "é", " 4", "2"]
TRIGGERS = ("Wait", "Alternatively")
WHOLE_WORD = re.compile(r"(?<![A-Za-z])(?:Wait|Alternatively)(?![A-Za-z])")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level tokens without merges, so that each piece can be made a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = [byte_level.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*alphabet, *written]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [byte_level, pre_tokenizers.Split(Regex("."), behavior="isolated")]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|eos|>")])
    backend.add_tokens([AddedToken("</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


def piece_ids(tokenizer) -> dict[int, float]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [tokenizer.convert_tokens_to_ids(byte_level.pre_tokenize_str(piece)[0][0]) for piece in PIECES]
    pieces = dict.fromkeys(ids, 1.0)
    first_byte_of_e_acute = tokenizer.encode("é")[0]
    return pieces | {
        first_byte_of_e_acute: 0.5,
        tokenizer.convert_tokens_to_ids("</think>"): 0.2,
        tokenizer.eos_token_id: 0.4,
    }


def oracle(engine: ScriptedEngine, callback: ConfidenceTruncation, prompt: list[int], max_tokens: int) -> list[int]:
    """The rollout of the paper and of the released code, written token by token, without calls, pauses or bounds."""
    tokenizer, eos = engine.tokenizer, engine.tokenizer.eos_token_id
    closing = tokenizer.encode(callback.closing, add_special_tokens=False)
    induce = tokenizer.encode(callback.answer_prompt, add_special_tokens=False)
    closes = "</think>" in callback.answer_prompt
    path, probes, watched = [], 0, True

    def generate(path, limit, stop=None):
        answer, logprobs = [], []
        while len(answer) < limit:
            token, logprob = engine.next([*prompt, *path, *answer])
            answer.append(token)
            logprobs.append(logprob)
            if token == eos or (stop and stop in tokenizer.decode(answer)):
                break
        return answer, logprobs

    def finish(path):
        return path[:max_tokens] + generate(path, max_tokens - len(path))[0]

    while len(path) < max_tokens:
        before = tokenizer.decode(path)
        path = [*path, engine.next([*prompt, *path])[0]]
        if path[-1] == eos or len(path) == max_tokens:
            return path
        text = tokenizer.decode(path)
        watched = watched and "</think>" not in text
        # A character in the making decodes to a replacement character: compare in ASCII.
        fresh = [m for m in WHOLE_WORD.finditer(text) if m.end() > len(before) or not text.startswith(before)]
        if not (watched and fresh and fresh[-1].end() > len(before.rstrip("\ufffd"))):
            continue
        start = next(i for i in range(len(path)) if len(tokenizer.decode(path[: i + 1])) > fresh[-1].start())
        remaining = max_tokens - len(path)
        kept = path if callback.keep_trigger else path[:start]
        if len(closing) < remaining <= callback.exit_margin:
            return finish(kept + closing)
        if callback.max_probes is not None and probes >= callback.max_probes:
            continue
        longest = callback.max_probe_tokens
        room = remaining - max(len(induce), len(closing)) - 1
        if not callback.keep_probe_answer and room < longest:
            continue
        if callback.keep_probe_answer and room < (1 if closes else longest + len(closing) + longest):
            continue
        limit = min(longest, room)
        answer, logprobs = generate(kept + induce, limit, None if closes else "</think>")
        probes += 1
        ended = answer[-1] == eos or (not closes and "</think>" in tokenizer.decode(answer))
        counted = logprobs[callback.skip_probe_tokens :]
        confidence = math.exp(sum(counted) / len(counted)) if counted else 0.0
        if not ended and (callback.require_probe_end or limit < longest):
            confidence = 0.0
        if confidence <= callback.threshold:
            continue
        if not callback.keep_probe_answer:
            return finish(kept + closing)
        kept = kept + induce + answer
        if answer[-1] == eos:
            return kept
        return finish(kept if ended or closes else kept + closing)
    return path


VARIANTS = {
    "paper": {},
    "released": ConfidenceTruncation.released() | {"triggers": TRIGGERS, "exit_margin": 6, "max_probes": 3},
    "open_thought_kept": {"answer_prompt": " 42", "keep_probe_answer": True},
    "no_trigger": {"keep_trigger": False},
    "anew": {"keep_probe_answer": False, "max_probes": 2},
    "strict": {"require_probe_end": True, "skip_probe_tokens": 2},
}
PAPER_PROMPT = "\n</think>\n\n4"


def build(tokenizer, options, **more):
    options = {"answer_prompt": PAPER_PROMPT, "max_probe_tokens": 5, "threshold": 0.9} | options | more
    if options["answer_prompt"].startswith("\n**"):
        options["answer_prompt"] = " 42"
    return ConfidenceTruncation(tokenizer, **{"triggers": TRIGGERS} | options)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("early_rejection", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_oracle_token_for_token(tokenizer, variant, early_rejection, speculative):
    rng = random.Random(variant)
    callback = build(tokenizer, VARIANTS[variant], early_rejection=early_rejection)
    exits = 0
    for salt in range(12):
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt, certain=rng.choice((0.5, 0.8, 0.95)))
        max_tokens = rng.choice((1, 7, 20, 60))
        prompts = [tokenizer.encode(f"{salt}.{i}") for i in range(20)]
        rollout = DynamicTruncatedRollout(engine, [callback], SamplingParams(max_tokens), speculative)
        for prompt, record in zip(prompts, rollout.run(prompts)):
            assert record.completion_ids == oracle(engine, callback, prompt, max_tokens)
            check_invariants(engine, record, max_tokens)
            exits += record.truncated
        assert engine.running == 0
    assert 10 < exits < 230  # neither side of the branch is empty


def check_invariants(engine, record, max_tokens):
    tokenizer, ids = engine.tokenizer, record.completion_ids
    assert 1 <= len(ids) <= max_tokens
    assert len(record.logprobs) == len(record.injected) == len(ids)
    assert ids[-1] == tokenizer.eos_token_id or len(ids) == max_tokens
    assert tokenizer.eos_token_id not in ids[:-1]
    assert record.sampled_tokens == record.injected.count(False) + record.discarded_tokens
    context = list(record.prompt_ids)
    for token, logprob, injected in zip(ids, record.logprobs, record.injected):
        sampled, sampled_logprob = engine.next(context)
        context.append(token)
        if injected:
            assert math.isnan(logprob)
        else:
            assert token == sampled
            assert math.isnan(logprob) or logprob == sampled_logprob
    if not record.truncated:
        assert not any(record.injected) and not any(map(math.isnan, record.logprobs))
    text = tokenizer.decode(ids)
    assert TriggerSegmenter(tokenizer, TRIGGERS).count(ids) == len(WHOLE_WORD.findall(text))


@given(st.sampled_from(sorted(VARIANTS)), st.integers(1, 90), st.integers(1, 12), st.integers(0, 50), st.booleans())
@settings(max_examples=60)
def test_no_exit_without_room_for_its_answer(tokenizer, variant, budget, longest, salt, speculative):
    options = VARIANTS[variant] | {"exit_margin": 0, "skip_probe_tokens": 0, "max_probe_tokens": longest}
    callback = build(tokenizer, options | {"threshold": 0.8})
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt, certain=0.95)
    rollout = DynamicTruncatedRollout(engine, [callback], SamplingParams(budget), speculative)
    closing, prompt = (
        len(tokenizer.encode(text, add_special_tokens=False)) for text in (callback.closing, callback.answer_prompt)
    )
    for record in rollout.run([tokenizer.encode(str(i)) for i in range(20)]):
        if record.truncated:
            left = budget - record.injected.index(True)
            if not callback.keep_probe_answer:
                assert left - closing >= longest
            elif "</think>" in callback.answer_prompt:
                assert record.ended or left - prompt > longest
            else:
                assert record.ended or left - prompt - len(record.probes[-1].token_ids) >= longest


def test_a_declined_probe_leaves_no_trace(tokenizer):
    """The released code joins the dropped and the new trigger to "WaitWait", which its step count does not see."""
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt=5, certain=0.0)
    prompts = [tokenizer.encode(str(i)) for i in range(40)]
    plain = DynamicTruncatedRollout(engine, [], SamplingParams(60)).run(prompts)
    for variant in VARIANTS.values():
        callback = build(tokenizer, variant | {"threshold": 1.0, "exit_margin": 0})
        probed = DynamicTruncatedRollout(engine, [callback], SamplingParams(60)).run(prompts)
        assert sum(len(record.probes) for record in probed) > 20
        assert [r.completion_ids for r in probed] == [r.completion_ids for r in plain]
        assert [r.logprobs for r in probed] == [r.logprobs for r in plain]


def test_early_rejection_saves_tokens_and_changes_nothing(tokenizer):
    records = {}
    for early in (False, True):
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt=9, certain=0.6)
        callback = build(tokenizer, {"max_probe_tokens": 12}, early_rejection=early)
        prompts = [tokenizer.encode(str(i)) for i in range(200)]
        records[early] = DynamicTruncatedRollout(engine, [callback], SamplingParams(60)).run(prompts)
    differences = [a.completion_ids != b.completion_ids for a, b in zip(records[False], records[True])]
    assert len(differences) == 200 and not any(differences)
    outcomes = [probe.outcome for record in records[True] for probe in record.probes]
    assert {"abandoned", "exit"} <= set(outcomes)
    tokens = {
        early: sum(len(p.token_ids) for r in records[early] for p in r.probes if p.outcome != "exit")
        for early in records
    }
    assert tokens[True] < tokens[False]
    assert all(p.confidence is None for r in records[True] for p in r.probes if p.outcome == "abandoned")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recorded_confidence_is_the_one_decided_on(tokenizer, variant):
    callback = build(tokenizer, VARIANTS[variant] | {"exit_margin": 0})
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt=11, certain=0.9)
    prompts = [tokenizer.encode(str(i)) for i in range(80)]
    records = DynamicTruncatedRollout(engine, [callback], SamplingParams(60)).run(prompts)
    probes = [probe for record in records for probe in record.probes]
    assert {"exit", "declined"} <= {probe.outcome for probe in probes}
    for probe in probes:
        assert probe.outcome == "abandoned" or (probe.confidence > callback.threshold) == (probe.outcome == "exit")


def test_runs_inside_a_running_loop(tokenizer):
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer))
    rollout = DynamicTruncatedRollout(engine, [build(tokenizer, {})], SamplingParams(20))

    async def cell():
        return rollout.run([tokenizer.encode("1")])

    assert asyncio.run(cell())[0].completion_ids == rollout.run([tokenizer.encode("1")])[0].completion_ids


@pytest.mark.parametrize(("threshold", "during"), [(700, 50_000), (90_000, 90_000), (0, 0)])
def test_garbage_is_collected_less_often_meanwhile(tokenizer, threshold, during):
    seen = []

    class Looking(TruncationCallback):
        def positions(self, prompt_ids, max_tokens, seed):
            return (1,)

        def at_boundary(self, boundary):
            seen.append(gc.get_threshold())
            return GoOn()

    inherited = gc.get_threshold()
    gc.set_threshold(threshold, 7, 8)
    try:
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer))
        DynamicTruncatedRollout(engine, [Looking()], SamplingParams(20)).run([tokenizer.encode("1")])
        assert seen == [(during, 7, 8)]
        assert gc.get_threshold() == (threshold, 7, 8)
    finally:
        gc.set_threshold(*inherited)


@pytest.mark.parametrize("speculative", [False, True])
def test_an_error_surfaces_as_itself_and_stops_the_others(tokenizer, speculative):
    class FailingCallback(ConfidenceTruncation):
        def after_probe(self, boundary, probe, answer):
            raise KeyError("from the callback")

    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer))
    callback = FailingCallback(tokenizer, answer_prompt=PAPER_PROMPT)
    rollout = DynamicTruncatedRollout(engine, [callback], SamplingParams(60), speculative)
    with pytest.raises(KeyError, match="from the callback"):
        rollout.run([tokenizer.encode(str(i)) for i in range(20)])
    assert engine.running == 0


def test_seeds_depend_on_the_position_alone(tokenizer):
    """A call has the same seed whether the thought continued during the probe or waited for it."""
    seen = {}
    for speculative in (False, True):
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt=3)
        calls = seen[speculative] = {}
        generate = engine.generate

        async def recording(prompt_ids, *, seed=None, calls=calls, generate=generate, **options):
            if options["temperature"]:
                assert calls.setdefault(tuple(prompt_ids), seed) == seed
            return await generate(prompt_ids, seed=seed, **options)

        engine.generate = recording
        rollout = DynamicTruncatedRollout(engine, [build(tokenizer, {})], SamplingParams(60), speculative)
        rollout.run([tokenizer.encode(str(i)) for i in range(30)], seeds=range(30))
    assert seen[False].items() <= seen[True].items()
    assert len(set(itertools.chain(seen[True].values()))) == len(seen[True])


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_rollouts_at_once_than_asked_for(tokenizer, limit):
    prompts = [tokenizer.encode(str(i)) for i in range(20)]

    def roll_out(max_in_flight):
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer))
        open_rollouts, most = 0, 0
        for_rollout = engine.for_rollout

        @asynccontextmanager
        async def counting(prompt_ids):
            nonlocal open_rollouts, most
            open_rollouts += 1
            most = max(most, open_rollouts)
            async with for_rollout(prompt_ids) as bound:
                yield bound
            open_rollouts -= 1

        engine.for_rollout = counting
        rollout = DynamicTruncatedRollout(
            engine, [build(tokenizer, {})], SamplingParams(60), max_in_flight=max_in_flight
        )
        return [record.completion_ids for record in rollout.run(prompts)], most

    limited, most = roll_out(limit)
    everything, most_of_all = roll_out(None)
    assert most == limit and most_of_all == 20
    assert limited == everything
    with pytest.raises(ValueError, match="max_in_flight: 0 lets no rollout begin"):
        roll_out(0)


# Tokens that are read while a rollout runs


def sample_all(rollout, prompts, on_tokens):
    async def together():
        return await asyncio.gather(
            *(rollout.sample(prompt, on_tokens=on_tokens(i)) for i, prompt in enumerate(prompts))
        )

    return asyncio.run(together())


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_that_are_read_early_are_those_of_the_rollout(tokenizer, variant, speculative):
    """No token is taken back, none is missing, and reading changes nothing."""
    early = 0
    for salt in range(6):
        engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt, certain=0.8)
        callbacks = [build(tokenizer, VARIANTS[variant]), TokenBudget(tokenizer, 40)]
        rollout = DynamicTruncatedRollout(engine, callbacks, SamplingParams(60), speculative)
        prompts = [tokenizer.encode(f"{salt}.{i}") for i in range(20)]
        expected = rollout.run(prompts)
        read = [[] for _ in prompts]
        records = sample_all(rollout, prompts, lambda i, read=read: read[i].append)
        for record, same, pieces in zip(records, expected, read, strict=True):
            assert list(itertools.chain(*pieces)) == record.completion_ids == same.completion_ids
            assert (record.truncated, record.probes) == (same.truncated, same.probes)
            early += len(pieces) > len(record.probes) + 3
        assert engine.running == 0
    assert early > 30


class Watching(ConfidenceTruncation):
    """Notes how many tokens have been read when a probe is answered."""

    def after_probe(self, boundary, probe, answer):
        self.seen.append((len(self.read), boundary.trigger_start, len(boundary.path_ids)))
        return super().after_probe(boundary, probe, answer)


def test_tokens_after_an_undecided_boundary_wait(tokenizer):
    callback = Watching(tokenizer, answer_prompt=PAPER_PROMPT, max_probe_tokens=5, threshold=0.9, keep_trigger=False)
    callback.seen, ahead = [], 0
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt=3, certain=0.8)
    rollout = DynamicTruncatedRollout(engine, [callback], SamplingParams(60))
    for i in range(40):
        callback.read, callback.seen = [], []
        (record,) = sample_all(rollout, [tokenizer.encode(str(i))], lambda _: callback.read.extend)
        assert all(read == trigger_start for read, trigger_start, _ in callback.seen)
        ahead += len(callback.seen)
        assert callback.read == record.completion_ids
    assert ahead > 40


def test_the_reader_may_end_a_rollout(tokenizer):
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer), salt=7, certain=0.8)
    rollout = DynamicTruncatedRollout(engine, [build(tokenizer, {})], SamplingParams(60))
    prompts = [tokenizer.encode(str(i)) for i in range(40)]
    wholes = rollout.run(prompts)
    shorter = 0
    for whole, prompt in zip(wholes, prompts, strict=True):
        read = []

        def until_enough(tokens, read=read):
            assert len(read) < 10
            read += tokens
            return len(read) >= 10

        (record,) = sample_all(rollout, [prompt], lambda _, until_enough=until_enough: until_enough)
        assert read == whole.completion_ids[: len(read)] and len(read) >= min(10, len(whole.completion_ids))
        assert read == record.completion_ids[: len(read)]
        shorter += len(record.completion_ids) < len(whole.completion_ids)
        assert engine.running == 0
    assert shorter > 10


def test_a_repeated_call_with_other_tokens_is_an_error(tokenizer):
    """Its first tokens have been read, and cannot be taken back."""
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer))
    generate = engine.generate
    a, b = tokenizer.encode("ab")

    async def repeated(prompt_ids, *, abandon=None, **options):
        abandon([a, b], [0.0, 0.0])
        return await generate([*prompt_ids, b], abandon=abandon, **options)

    engine.generate = repeated
    rollout = DynamicTruncatedRollout(engine, [], SamplingParams(20))
    with pytest.raises(EngineError, match="interrupted after some of its tokens had been handed on"):
        sample_all(rollout, [tokenizer.encode("1")], lambda _: lambda tokens: None)


def test_other_options_share_the_tables_of_triggers(tokenizer):
    engine = ScriptedEngine(tokenizer, piece_ids(tokenizer))
    rollout = DynamicTruncatedRollout(engine, [build(tokenizer, {})])
    callbacks = [TokenBudget(tokenizer, 5), build(tokenizer, {"threshold": 0.5})]
    other = rollout.with_options(callbacks, SamplingParams(30))
    assert other.segmenters == [None, rollout.segmenters[0]]
    prompts = [tokenizer.encode(str(i)) for i in range(20)]
    expected = DynamicTruncatedRollout(engine, callbacks, SamplingParams(30)).run(prompts)
    assert [r.completion_ids for r in other.run(prompts)] == [r.completion_ids for r in expected]
    assert rollout.sampled_tokens == 0 < other.sampled_tokens
    assert rollout.sampling == SamplingParams()
