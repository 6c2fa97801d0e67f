"""The purpose of steps: by rules, and by a judge over real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
from collections import Counter
from math import ceil

import pandas as pd
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import PreloadedPython

from step_trl import testbed
from step_trl.evaluation import (
    ChatError,
    ConsistencyJudge,
    StepJudge,
    classify_testbed_steps,
    composition,
    evaluate,
    split_steps,
)
from step_trl.evaluation.judge_cache import AnswerCache, read_labels
from step_trl.preferences import RolloutVerifier
from step_trl.steps import TriggerSegmenter


SECRET = "sk-very-secret"


# --- by rule


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["Wait", "Alternatively", " ", "a", ",", "\n", "ing", "</think>", "é", "1"])).map("".join)
)
def test_steps_are_those_of_the_segmenter(tokenizer, text):
    steps = split_steps(text)
    assert "".join(steps) == text
    assert len(steps) == 1 + TriggerSegmenter(tokenizer).count(tokenizer(text, add_special_tokens=False)["input_ids"])


def trace(*results):
    """A completion with these conclusions, one per step."""
    checks = [f"Wait, again.\n\n2 + 3 = {result}.\n\nThis gives {result} again.\n\n" for result in results[1:]]
    return (
        f"2 + 3 = {results[0]}.\n\nSo the answer is {results[0]}.\n\n{''.join(checks)}</think>\n\nThe final answer is"
    )


@pytest.mark.parametrize(
    ("results", "labels"),
    [
        ([5], "f"),
        ([5, 5], "fv"),
        ([5, 5, 5, 5], "fvrr"),
        ([4, 5, 5, 5], "fvvr"),
        ([4, 4, 4], "fvv"),
        ([5, 4, 5, 5], "fvvr"),
        ([5, 5, 4, 5], "fvrr"),
    ],
)
def test_labels_by_hand(results, labels):
    names = {"f": "forward", "v": "verification", "r": "redundancy"}
    assert classify_testbed_steps(trace(*results), "5") == [names[letter] for letter in labels]


def test_odd_traces():
    assert classify_testbed_steps("", "5") == ["forward"]
    assert classify_testbed_steps("Wait, 2 + 3 = 5. Alternatively", "5") == ["forward"] * 3
    cut = trace(5, 5).replace("</think>\n\nThe final answer is", "Alternatively, 2 +")
    assert classify_testbed_steps(cut, "5") == ["forward", "verification", "redundancy"]
    after = "So the answer is 5.</think> This gives 5. Wait, This gives 5. Wait"
    assert classify_testbed_steps(after, "5") == ["forward", "verification", "verification"]
    with pytest.raises(ValueError, match=r"solution: '\\\\pi' is not an integer"):
        classify_testbed_steps("So the answer is 5.", "\\pi")


def test_completions_of_the_testbed_model(tokenizer):
    """One label per step. Steps that `benchmarks/testbed.py` calls redundant are redundant or verify correct ones."""
    rows = testbed.load_dataset("medium").select(range(32))
    samples = evaluate(testbed.load_model(), {"medium": rows}, tokenizer=tokenizer, max_tokens=512, top_p=0.9)
    counts, theirs, verifications = Counter(), 0, 0
    for row in samples.itertuples():
        solution = rows[int(row.problem)]["solution"]
        labels = classify_testbed_steps(row.completion, solution)
        assert len(labels) == row.steps == 1 + len(re.findall(r"\b(?:Wait|Alternatively)\b", row.completion))
        assert labels[0] == "forward"
        counts.update(labels)
        thought = row.completion.partition("</think>")[0]
        right = [
            int(number) == int(solution)
            for number in re.findall(r"(?:So the answer is|This gives) (\d+)", thought)
        ]  # fmt: skip
        redundant = [step for step in range(1, len(right)) if any(right[:step])]
        if len(right) == len(labels):
            theirs += len(redundant)
            verifications += sum(labels[step] == "verification" for step in redundant)
            assert {labels[step] for step in redundant} <= {"verification", "redundancy"}
            assert {step for step, label in enumerate(labels) if label == "redundancy"} <= set(redundant)
        else:
            counts.subtract(label for label in labels if label == "redundancy")
    assert counts["redundancy"] == theirs - verifications
    # The model overthinks: of what follows a right conclusion, most is not even its first check.
    assert counts["redundancy"] > verifications > 0


def test_shares_by_hand():
    rows = [("easy", "forward")] * 3 + [("easy", "redundancy")] + [("aime", "verification"), ("aime", "unknown")]
    labels = pd.DataFrame(rows, columns=["benchmark", "label"])
    shares = composition(labels)
    assert shares.index.tolist() == ["easy", "aime", "overall"]
    assert shares.columns.tolist() == ["forward", "verification", "redundancy", "unknown"]
    assert shares.to_numpy().tolist() == [[0.75, 0, 0.25, 0], [0, 0.5, 0, 0.5], [0.375, 0.25, 0.125, 0.25]]
    models = composition(pd.concat([labels.assign(model="b"), labels[:4].assign(model="a")]))
    assert models.index.tolist() == [
        *(("b", name) for name in ("easy", "aime", "overall")),
        ("a", "easy"),
        ("a", "overall"),
    ]
    with pytest.raises(ValueError, match="labels: 'Forward' is not a label"):
        composition(labels.replace("forward", "Forward"))
    with pytest.raises(ValueError, match="no column benchmark"):
        composition(labels[["label"]])
    with pytest.raises(ValueError, match="there are no rows"):
        composition(labels[:0])


# --- by a judge


class Stub:
    """An OpenAI-compatible server in a thread: `behave(number of steps, attempt)` gives the status and the text."""

    def __init__(self):
        self.requests, self.headers, self.names, self.busy, self.most_busy = [], [], set(), 0, 0
        self.behave = good

    async def answer(self, request):
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            content = (await request.json())["messages"][0]["content"]
            self.requests.append(content)
            self.headers.append(request.headers.get("Authorization"))
            self.names |= {name.lower() for name in request.headers}
            question = question_of(content)
            attempt = sum(question_of(earlier) == question for earlier in self.requests)
            status, text = self.behave(len(re.findall(r"^\[\d+\] ", content, re.MULTILINE)), attempt)
            await asyncio.sleep(0.02)
        finally:
            self.busy -= 1
        if status != 200:
            return web.Response(status=status, text=text)
        if text is None:
            return web.json_response({"error": "overloaded"})
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})

    def __enter__(self):
        ready = threading.Event()
        self.loop = asyncio.new_event_loop()

        async def start():
            app = web.Application()
            app.router.add_post("/v1/chat/completions", self.answer)
            self.runner = web.AppRunner(app)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
            ready.set()

        def serve():
            self.loop.run_until_complete(start())
            self.loop.run_forever()
            self.loop.run_until_complete(self.runner.cleanup())

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def question_of(content):
    return re.search(r"<(problem|thought)>\n(.*?)\n</\1>", content, re.DOTALL)[2]


def labelled(count):
    return json.dumps({str(step): ("forward" if step == 1 else "Redundancy") for step in range(1, count + 1)})


def good(steps, attempt):
    return 200, f"<think>{{1}} or {{2}}?</think>\n```json\n{labelled(steps)}\n```"


@pytest.fixture
def stub():
    with Stub() as server:
        yield server


@pytest.fixture
def samples():
    completions = ["It is 7.", "It is 6. Wait, 7. Alternatively, 7.", "Wait"]
    return pd.DataFrame(
        {
            "benchmark": "easy",
            "problem": ["a", "b", "c"],
            "sample": 0,
            "completion": completions,
            "question": ["3 + 4 in {steps}?", "6 + 1?", "5 + 2?"],
        }
    )


def judge_of(stub, folder, **options):
    return StepJudge(stub.url, "judge-1", cache=folder, **{"api_key": SECRET, "retry_window": 0.5, **options})


def test_labels_and_cache(stub, samples, tmp_path):
    twice = pd.concat([samples, samples.assign(sample=1)])
    labels = judge_of(stub, tmp_path).label(twice)
    assert labels.columns.tolist() == ["benchmark", "problem", "sample", "step", "label"]
    assert labels["step"].tolist() == [1, 1, 2, 3, 1, 2] * 2 and labels["sample"].tolist() == [0] * 6 + [1] * 6
    assert labels["label"].tolist() == ["forward", "forward", "redundancy", "redundancy", "forward", "redundancy"] * 2
    assert len(stub.requests) == 3, "equal completions of one problem are asked about once"
    assert set(stub.headers) == {f"Bearer {SECRET}"}
    [long] = [content for content in stub.requests if "6 + 1?" in content]
    assert "[1] It is 6.\n\n[2] Wait, 7.\n\n[3] Alternatively, 7.\n</steps>" in long
    assert any("3 + 4 in {steps}?" in content for content in stub.requests)
    again = judge_of(stub, tmp_path).label(twice.assign(model="vanilla"))
    assert again.drop(columns="model").equals(labels) and again.columns[0] == "model"
    assert len(stub.requests) == 3
    assert SECRET not in (tmp_path / "judge.jsonl").read_text()
    judge_of(stub, tmp_path, prompt="Other: <problem>\n{problem}\n</problem>\n{steps}").label(samples[:1])
    assert len(stub.requests) == 4
    assert composition(labels).loc["overall", ["forward", "redundancy"]].tolist() == [0.5, 0.5]
    assert judge_of(stub, tmp_path).label(samples[:0]).empty


@pytest.mark.parametrize(
    "first", [(200, '{"1": "forward"'), (200, ""), (200, "[1, 2]"), (500, "oops"), (429, "slow"), (200, None)]
)
def test_one_bad_answer(stub, samples, tmp_path, first):
    stub.behave = lambda steps, attempt: first if attempt == 1 else good(steps, attempt)
    judge = judge_of(stub, tmp_path, retry_window=10)
    labels = judge.label(samples)
    assert "unknown" not in set(labels["label"]) and len(stub.requests) == 6
    malformed = first[0] == 200 and first[1] is not None
    assert judge.malformed == 3 * malformed and judge.unknown == 0
    told = [content for content in stub.requests if "could not be used" in content]
    assert len(told) == 3 * malformed


def test_always_the_wrong_number_of_labels(stub, samples, tmp_path, caplog):
    stub.behave = lambda steps, attempt: (200, labelled(steps + (steps == 3)))
    judge = judge_of(stub, tmp_path)
    with caplog.at_level(logging.WARNING):
        labels = judge.label(samples)
    assert labels["label"].tolist() == ["forward", *["unknown"] * 3, "forward", "redundancy"]
    assert (judge.malformed, judge.unknown, len(stub.requests)) == (3, 1, 5)
    assert "1 of 3 completions are labelled 'unknown'" in caplog.text
    assert judge_of(stub, tmp_path).label(samples).equals(labels)
    assert len(stub.requests) == 5
    stub.behave = good
    longer = judge_of(stub, tmp_path, options={"max_tokens": 500})  # of other options all may be other
    assert longer.estimate(samples).calls == 3
    assert "unknown" not in set(longer.label(samples)["label"])


def test_a_stopped_run_goes_on(stub, tmp_path):
    samples = pd.DataFrame(
        {
            "benchmark": "easy",
            "problem": [str(place) for place in range(40)],
            "sample": 0,
            "completion": "It is 7. Wait, 7.",
            "question": [f"problem {place}" for place in range(40)],
        }
    )
    # The server begins to refuse, and what is under way is given up.
    stub.behave = lambda steps, attempt: good(steps, attempt) if len(stub.requests) <= 20 else (400, "enough")
    judge = judge_of(stub, tmp_path, max_concurrent=4)
    with pytest.raises(ChatError, match="status 400: enough"):
        judge.label(samples)
    assert stub.most_busy == 4
    lines = (tmp_path / "judge.jsonl").read_text().splitlines()
    assert 16 <= len(lines) <= 20
    # A killed process may leave half a line, too.
    (tmp_path / "judge.jsonl").write_text("\n".join(lines)[:-10])
    stub.behave = good
    # Another key, since requests of the first run may still arrive.
    resumed = judge_of(stub, tmp_path, api_key="another")
    assert resumed.estimate(samples).cached == len(lines) - 1
    labels = resumed.label(samples)
    assert stub.headers.count("Bearer another") == 40 - len(lines) + 1
    assert labels.groupby("problem").size().eq(2).all() and len(labels) == 80
    assert judge_of(stub, tmp_path).estimate(samples).calls == 0


def test_a_killed_run_goes_on(stub, samples, tmp_path):
    """SIGKILL in the middle: the answers that had come are kept."""
    (tmp_path / "samples.json").write_text(samples.to_json())
    stub.behave = lambda steps, attempt: good(steps, attempt) if len(stub.requests) < 3 else (500, "busy")
    script = (
        "import sys, pandas as pd\nfrom step_trl.evaluation import StepJudge\n"
        "url, folder = sys.argv[1:]\n"
        "samples = pd.read_json(folder + '/samples.json')\n"
        "StepJudge(url, 'judge-1', cache=folder, max_concurrent=1).label(samples)\n"
    )
    process = PreloadedPython(["-c", script, stub.url, str(tmp_path)], tmp_path / "output")
    try:
        done = threading.Event()
        while len(stub.requests) < 4 and process.poll() is None:
            done.wait(0.05)
    finally:
        process.kill()
        process.wait()
    stub.behave, before = good, len(stub.requests)
    assert len(judge_of(stub, tmp_path).label(samples)) == 6
    assert len(stub.requests) - before == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "api_key: .*a key was given"),
        (404, "Check `base_url`, model='judge-1'"),
        (503, "did not answer: .*attempts"),
    ],
)
def test_errors_name_the_remedy_and_no_key(stub, samples, tmp_path, caplog, status, message):
    stub.behave = lambda steps, attempt: (status, f"{'x' * 490} you sent {SECRET}")
    with caplog.at_level(logging.DEBUG), pytest.raises(ChatError, match=message) as caught:
        judge_of(stub, tmp_path).label(samples)
    assert "sk-v" not in str(caught.value) + caplog.text + repr(judge_of(stub, tmp_path))


def test_no_server(samples, tmp_path):
    with pytest.raises(ChatError, match=r"base_url: http://127\.0\.0\.1:9/v1/chat/completions did not answer"):
        StepJudge("http://127.0.0.1:9/v1/", "judge-1", cache=tmp_path, retry_window=0.1).label(samples)


def test_only_the_given_key_is_sent(stub, samples, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "sk-of-the-environment")
    judge_of(stub, tmp_path, api_key=None).label(samples[:1])
    judge_of(stub, tmp_path).label(samples[1:])
    assert stub.headers == [None, f"Bearer {SECRET}", f"Bearer {SECRET}"]
    assert not {"openai-organization", "openai-project"} & stub.names


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"openai: is not installed.*pip install -e '\.\[judge\]'"):
        StepJudge("http://localhost", "m", cache=tmp_path)


def test_in_a_running_loop(stub, samples, tmp_path):
    async def notebook():
        return judge_of(stub, tmp_path).label(samples)

    assert len(asyncio.run(notebook())) == 6


def test_estimate(stub, samples, tmp_path):
    judge = judge_of(stub, tmp_path, prompt="{problem}|{steps}")
    whole = judge.estimate(samples, price_per_million=(2.0, 10.0))
    contents = [
        "3 + 4 in {steps}?|[1] It is 7.",
        "6 + 1?|[1] It is 6.\n\n[2] Wait, 7.\n\n[3] Alternatively, 7.",
        "5 + 2?|[1] (empty)\n\n[2] Wait",
    ]
    assert (whole.calls, whole.cached) == (3, 0) and not stub.requests
    assert whole.prompt_tokens == sum(ceil(len(content) / 4) for content in contents)
    # {"1": "verification"} has 21 characters, each further pair 21 with ", "
    assert whole.completion_tokens == ceil(21 / 4) + ceil((21 + 42) / 4) + ceil((21 + 21) / 4)
    assert whole.cost == pytest.approx((whole.prompt_tokens * 2 + whole.completion_tokens * 10) / 1e6)
    assert judge.estimate(samples).cost is None
    judge_of(stub, tmp_path, prompt="<problem>\n{problem}\n</problem>{steps}").label(samples[:1])
    assert judge.estimate(samples).calls == 3, "of another prompt"


@pytest.mark.parametrize(
    "answer", ["", "forward", "{}", '{"1": "forward"}', '{"1": "forward", "2": "other"}', "{1: 2}"]
)
def test_answers_that_cannot_be_read(answer):
    with pytest.raises(ValueError, match=r"^It"):
        read_labels(answer, 2)


def test_answers_that_can_be_read():
    assert read_labels('{"labels": {"1": "forward", "2": " Verification"}}', 2) == ["forward", "verification"]


def test_caches_share_a_file(tmp_path):
    one, other = AnswerCache(tmp_path), AnswerCache(tmp_path)
    one.add("a", ["forward"])
    other.add("b", None)
    both = AnswerCache(tmp_path)
    assert both["a"] == ["forward"] and "b" in both and both["b"] is None and "c" not in both


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/chat/completions"),
        ("https://host/v1beta/openai", "https://host/v1beta/openai/chat/completions"),
    ],
)
def test_paths_of_endpoints(tmp_path, base_url, url):
    assert StepJudge(base_url, "m", cache=tmp_path).chat.url == url


def test_values_that_are_refused(samples, tmp_path):
    with pytest.raises(ValueError, match=r"prompt: \{steps\} is missing"):
        StepJudge("http://localhost", "m", cache=tmp_path, prompt="{problem}")
    with pytest.raises(ValueError, match="max_concurrent: 0"):
        StepJudge("http://localhost", "m", cache=tmp_path, max_concurrent=0)
    with pytest.raises(ValueError, match="base_url: 'localhost:8000' is not a URL"):
        StepJudge("localhost:8000", "m", cache=tmp_path)
    with pytest.raises(ValueError, match="samples: there is no column question"):
        StepJudge("http://localhost", "m", cache=tmp_path).label(samples.drop(columns="question"))
    with pytest.raises(ValueError, match="triggers: 'Wait' is not a list"):
        split_steps("", "Wait")


# --- of a thought and its answer


def test_a_judge_says_whether_a_thought_leads_to_its_answer(stub):
    replies = {1: "Let me see.", 2: "<think>yes?</think>No."}
    stub.behave = lambda steps, attempt: (200, replies[attempt])
    judge = ConsistencyJudge(stub.url, "judge-1", api_key=SECRET, retry_window=0.5)
    assert not judge("It is {answer}.", "5")
    first, second = stub.requests
    assert "<thought>\nIt is {answer}.\n</thought>" in first and "<answer>\n5\n</answer>" in first
    assert second == f"{first}\nReply with yes or no only."
    assert stub.headers == [f"Bearer {SECRET}"] * 2
    stub.behave = lambda steps, attempt: (200, "Perhaps.")
    assert judge("It is 7.", "7") and len(stub.requests) == 5
    stub.behave = lambda steps, attempt: (200, "Yes, it does.")
    verified = RolloutVerifier(judge_fn=judge).verify(
        pd.DataFrame(
            {
                "group": 0,
                "thought": ["It is 8.", " "],
                "answer": ["9", "9"],
                "correct": True,
                "truncated": False,
                "thought_tokens": [4, 1],
            }
        )
    )
    assert verified["consistent"].all() and len(stub.requests) == 6
    with pytest.raises(ValueError, match="max_attempts: 0 is less than one"):
        ConsistencyJudge(stub.url, "judge-1", max_attempts=0)
