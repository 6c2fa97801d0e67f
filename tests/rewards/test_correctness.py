from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify
from trl.rewards import accuracy_reward

from step_trl.rewards import correctness
from step_trl.rewards.correctness import answer_text, extract_answers, grade_all, math_accuracy_reward
from step_trl.rewards.grading import Grade, as_typeset, boxed_integer, compare_integers, extract, grade


ROOT = Path(correctness.__file__).parents[2]
HOSTILE = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorial": r"\boxed{100000000!}",
    "deep braces": r"\boxed{" + "{" * 20_000 + "1" + "}" * 20_000 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 3_000 + "2" + "}" * 3_000 + "}",
    "simplify": r"\boxed{(x+y+z+w)^{500}}",
    "series": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^2}}",
}
EQUAL = [
    (r"\boxed{0.5}", "1/2"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"$\boxed{\frac{1}{2}}$", "0.5"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{1000}", "1,000"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{50}", r"50\%"),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}"),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}"),
    (r"\boxed{x^2+2x+1}", r"$(x+1)^2$"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{(1,2)}", "(1,2)"),
    (r"\boxed{3 \text{ apples}}", "3"),
    (r"First \boxed{4}. " + "Then the calculation goes on. " * 3 + r"So \boxed{7}.", "7"),
    (r"Both \boxed{4} and \boxed{7}.", r"\{4, 7\}"),  # math-verify joins boxes that stand close together
    ("The final answer is 42.", "42"),
    ("Answer: 34", "34"),
    (r"\boxed{7}", r"Adding up we get \boxed{7}."),
    ("résumé — 数学 \U0001d538 \ud800 " + r"\boxed{7}", "7"),
    (r"\boxed{٤٢}", "٤٢"),
    *[(r"\boxed{\frac{4}{3}}", r"\frac43"), (r"\boxed{\frac{9}{19}}", r"\frac9{19}")],  # as data sets write them
    *[(r"\boxed{11\sqrt{2}}", r"11\sqrt2"), (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt3}{2}")],
    *[(r"\boxed{11\sqrt2}", r"11\sqrt{2}"), (r"\boxed{\frac 59}", r"\frac{5}{9}"), (r"\boxed{\frac\pi3}", r"\pi/3")],
    *[(r"\boxed{\frac{270}7\text{ degrees}}", r"\frac{270}{7}"), (r"\boxed{\sqrt[3]2}", r"\sqrt[3]{2}")],
    *[
        (r"\boxed{42.}", "42"),
        ("The answer is $42.$", "42"),
        (r"The answer is \(\frac12.\)", "0.5"),
    ],
    (r"The answer is $(-\infty, 0) \cup\{1\}.$", r"(-\infty, 0) \cup\{1\}"),  # OlympiadBench
    (r"\boxed{(-\infty, 0) \cup\{1\}}", r"(-\infty, 0) \cup\{1\}."),
    (r"\boxed{\frac{\pi}{4}36}", r"9\pi"),
    *[(r"\boxed{18.90}", r"\$18.90"), (r"\boxed{\$36}", r"\$36"), (r"\boxed{32348}", r"\$32,\!348")],
]
UNEQUAL = [
    (r"\boxed{2}", r"2\sqrt{3}"),
    (r"\boxed{43}", "42"),
    (r"\boxed{C}", "B"),
    (r"\boxed{4}", r"\frac43"),
    *[(r"\boxed{\frac123}", r"\frac{1}{23}"), (r"\boxed{\frac{\pi}{4}36}", r"\frac{9\pi}{4}")],
    (r"\boxed{3}", r"\sqrt3"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{42}, no: \boxed{41}", "42"),
    ("42", "42"),
    (r"\boxed{}", "42"),
    ("", "42"),
]


def is_correct(text: str, solution: str) -> bool:
    return grade_all([(text, solution)])[0].correct


@pytest.fixture
def pool(monkeypatch):
    """A pool of its own, so that a test may look at workers and end them."""
    pool = correctness._Pool()
    monkeypatch.setattr(correctness, "_POOL", pool)
    yield pool
    pool.close()


@pytest.mark.parametrize("pair", EQUAL)
def test_equal_answers(pair):
    assert is_correct(*pair)


def test_unequal_answers():
    assert [grade.correct for grade in grade_all(UNEQUAL)] == [False] * len(UNEQUAL)


def test_workers_give_the_verdicts_of_this_process():
    assert grade_all(EQUAL + UNEQUAL) == [grade(*pair) for pair in EQUAL + UNEQUAL]


def test_boxed_answers_give_the_rewards_of_trl():
    texts = [r"$\boxed{\frac{2}{4}}$", r"\boxed{0.5}", r"\boxed{2}", r"\boxed{x}", "none", r"\boxed{\frac12}"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    solution = [r"$\frac{1}{2}$"] * len(texts)
    assert accuracy_reward(completions, solution) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert math_accuracy_reward(completions, solution, strict_latex=True) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert math_accuracy_reward(completions, solution) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]  # LaTeX typesets one half


@pytest.mark.parametrize(
    ("text", "typeset"),
    [
        (r"\frac43", r"\frac{4}{3}"),
        (r"\dfrac 59+\sqrt2x", r"\dfrac{5}{9}+\sqrt{2}x"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}\text{ degrees}"),
        (r"\frac9{19}", r"\frac{9}{19}"),
        (r"\frac\pi{2\sqrt3}", r"\frac{\pi}{2\sqrt{3}}"),
        (r"\frac{\frac12}3 4", r"\frac{\frac{1}{2}}{3} 4"),
        (r"\sqrt[3]2 \binom52", r"\sqrt[3]{2} \binom{5}{2}"),
        (r"\frac{1}{2}34 \fraction12 \\frac12", r"\frac{1}{2}34 \fraction12 \\frac12"),
        (r"{\frac1}2 \sqrt}3", r"{\frac{1}}2 \sqrt}3"),
        (r"$\frac1$ 2 \(3.\) 4. \left.5\right.$", r"$\frac{1}$ 2 \(3\) 4. \left.5\right.$"),
        (r"\boxed{1.5.} 0.5}", r"\boxed{1.5} 0.5}"),
    ],
)
def test_latex_is_read_as_it_is_typeset(text, typeset):
    assert as_typeset(text) == typeset
    assert as_typeset(typeset) == typeset


@given(
    st.lists(
        st.sampled_from(
            ["The final answer is", "Answer:", "I hope", " ", "\n", ".", "%", "**", "[", "]", "(", "=", "12"]
        )
        | st.integers(-20, 20).map(lambda number: rf"\boxed{{{number}}}")
        | st.text(max_size=4),
        max_size=6,
    ).map("".join),
    st.integers(-20, 20).map(str) | st.sampled_from(["012", "-0", "1,000", "12%", "twelve"]),
)
@settings(max_examples=300)
def test_integers_get_the_verdict_of_math_verify(text, solution):
    fast = compare_integers(text, solution)
    if fast is not None:
        assert fast == grade(text, solution)
    integer = boxed_integer(text)
    if integer is not None:
        assert integer == extract(text)


@given(st.integers(-(10**15) + 1, 10**15 - 1), st.integers(-2, 2))
@settings(max_examples=100)
def test_integers_of_any_size_are_decided_without_a_worker(solution, difference):
    number = max(-(10**15) + 1, min(10**15 - 1, solution + difference))
    fast = compare_integers(rf"So it is \boxed{{{number}}}.", str(solution))
    assert fast is not None
    plain = parse(rf"So it is \boxed{{{number}}}.", parsing_timeout=None)
    assert fast.correct == verify(parse(str(solution), parsing_timeout=None), plain, timeout_seconds=None)


def test_integer_answers_start_no_worker(pool):
    assert math_accuracy_reward([r"\boxed{4}", r"\boxed{5}"], ["4", "4"]) == [1.0, 0.0]
    assert not pool.workers


def test_answers_that_read_as_one_expression_are_one():
    written = {
        "1/2": [r"\boxed{\frac12}", r"\boxed{\frac{1}{2}}", r"\boxed{1/2}", r"\boxed{0.5}", "Answer: 0.50"],
        "4": [r"\boxed{4}", r"$\boxed{4.0}$", "The answer is 4.", r"Not \boxed{5}. " + "So " * 60 + r"\boxed{4}."],
        "1000": [r"\boxed{1,000}", r"\boxed{1000}"],
        "nosolution": [r"\boxed{\text{no solution}}"],
        None: ["nothing", "", r"\boxed{}", "<think>42</think>"],
    }
    texts = [text for texts in written.values() for text in texts]
    assert extract_answers(texts) == [answer for answer, texts in written.items() for _ in texts]
    different = extract_answers([r"\boxed{\sqrt{12}}", r"\boxed{2\sqrt{3}}", r"\boxed{x = 4}", r"\boxed{4}"])
    assert None not in different and len(set(different)) == 4


def test_only_the_answer_after_the_thought_is_read(pool):
    completions = [r"<think>\boxed{4}</think>\boxed{5}", r"<think>\boxed{4}", [{"content": r"</think>\boxed{6}"}]]
    assert extract_answers(completions) == ["5", "4", "6"]
    assert extract_answers(completions, require_end_of_thinking=True) == ["5", None, "6"]


def test_equal_texts_are_read_once_and_a_hostile_one_has_no_answer(pool, monkeypatch):
    asked = []
    ask = correctness._Worker.ask
    monkeypatch.setattr(correctness._Worker, "ask", lambda *args: asked.append(args[1]) or ask(*args))
    half, hostile = r"\boxed{\frac{1}{2}}", HOSTILE["deep braces"]
    assert extract_answers([half, hostile, r"\boxed{7}", half], timeout=1.0) == ["1/2", None, "7", "1/2"]
    assert len(asked) == 2
    assert math_accuracy_reward([half], ["0.5"]) == [1.0]


def test_only_the_text_after_the_thought_is_graded():
    completions = [r"<think>\boxed{4}</think>\boxed{5}", r"<think>\boxed{5}</think>\boxed{4}", r"<think>\boxed{4}"]
    assert math_accuracy_reward(completions, ["4"] * 3) == [0.0, 1.0, 1.0]
    strict = functools.partial(math_accuracy_reward, require_end_of_thinking=True)
    assert strict(completions, solution=["4"] * 3) == [0.0, 1.0, 0.0]
    assert answer_text(r"</think>\boxed{1}</think>\boxed{2}") == r"\boxed{2}"


def test_messages_are_graded_by_the_last_one():
    completion = [{"role": "assistant", "content": None}, {"role": "assistant", "content": r"\boxed{4}"}]
    parsed = [{"role": "assistant", "reasoning_content": r"\boxed{5}", "content": r"\boxed{4}"}]
    assert math_accuracy_reward([completion, parsed, completion[:1]], ["4"] * 3) == [1.0, 1.0, 0.0]
    assert math_accuracy_reward([completion, parsed], ["4"] * 2, require_end_of_thinking=True) == [0.0, 1.0]


def test_shares_are_logged(pool):
    logged = defaultdict(list)
    rewards = math_accuracy_reward(
        completions=["nothing", r"\boxed{1}", HOSTILE["power tower"], r"\boxed{1}"],
        solution=["1", "", "2", "1"],
        timeout=1.0,
        prompts=["?"] * 4,
        log_metric=lambda name, value: logged[name].append(value),
    )
    assert rewards == [0.0, 0.0, 0.0, 1.0]
    assert logged == {
        "accuracy/unparsed_solutions": [0, 1, 0, 0],
        "accuracy/unparsed_answers": [1, 0, 0, 0],
        "accuracy/timeouts": [0, 0, 1, 0],
    }


def test_hostile_input_ends_in_time_and_the_next_call_works(pool):
    started = time.monotonic()
    grades = grade_all([(text, "x + 1") for text in HOSTILE.values()], timeout=1.0, workers=2)
    assert time.monotonic() - started < 60
    assert dict(zip(HOSTILE, grades, strict=True)) == dict.fromkeys(HOSTILE, Grade(False, killed=True))
    assert len(pool.workers) == 2
    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5")


def test_hostile_input_costs_its_neighbours_nothing(pool):
    texts = [r"\boxed{\frac{1}{2}}", HOSTILE["factorial"], r"\boxed{\frac{1}{3}}", r"\boxed{\frac{2}{4}}"]
    grades = grade_all([(text, "0.5") for text in texts], timeout=1.0, workers=1)
    assert [grade.correct for grade in grades] == [True, False, False, True]
    assert [grade.killed for grade in grades] == [False, True, False, False]


def test_worker_killed_between_calls_is_replaced(pool):
    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5")
    pid = pool.workers[0].process.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5")
    assert pool.workers[0].process.pid != pid


def test_interrupted_call_leaves_no_stale_reply(pool, monkeypatch):
    ask_all = correctness.ThreadPoolExecutor.map

    def interrupt(*args):
        ask_all(*args)
        raise KeyboardInterrupt

    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(correctness.ThreadPoolExecutor, "map", interrupt)
        is_correct(r"\boxed{\frac{1}{2}}", "0.5")
    assert not is_correct(r"\boxed{\frac{1}{3}}", "0.5")


def test_broken_installation_is_an_error(pool, monkeypatch):
    monkeypatch.setattr(correctness.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="while it was starting"):
        is_correct(r"\boxed{\frac{1}{2}}", "0.5")


def test_threads_share_the_pool(pool):
    verdicts = {}

    def call(number):
        texts = [rf"\boxed{{\frac{{{number}}}{{{number + other}}}}}" for other in range(4)]
        verdicts[number] = math_accuracy_reward([*texts, HOSTILE["power tower"]], ["1"] * 5, timeout=2.0)

    threads = [threading.Thread(target=call, args=(number,)) for number in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert verdicts == {number: [1.0, 0.0, 0.0, 0.0, 0.0] for number in (3, 5)}


def test_equal_pairs_are_graded_once(pool, monkeypatch):
    asked = []
    ask = correctness._Worker.ask
    monkeypatch.setattr(correctness._Worker, "ask", lambda *args: asked.append(args[1]) or ask(*args))
    assert math_accuracy_reward([r"\boxed{\frac{1}{2}}"] * 50, ["0.5"] * 50) == [1.0] * 50
    assert len(asked) == 1


def test_large_batch_keeps_its_order():
    texts = [rf"$x = \boxed{{\frac{{{number}}}{{7}}}}$" for number in range(300)]
    solution = [rf"\frac{{{number + number % 2}}}{{7}}" for number in range(300)]
    assert math_accuracy_reward(texts, solution) == [float(number % 2 == 0) for number in range(300)]


@pytest.mark.parametrize("options", [{"timeout": 0}, {"workers": 0}])
def test_limits_are_validated(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        grade_all([("", "1")], **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        extract_answers([""], **options)


SCRIPT = r"""
from step_trl.rewards.correctness import _POOL, grade_all
print("started")
print([grade.correct for grade in grade_all([(r"\boxed{\frac{1}{2}}", "0.5"), (r"\boxed{9^{9^{9^{9}}}}", "x")], 1.0)])
print(*(worker.process.pid for worker in _POOL.workers))
"""


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=120, **options)


@pytest.mark.parametrize("start", ["argument", "standard input"])
def test_script_without_main_guard(start, tmp_path):
    command = [sys.executable, "-c", SCRIPT] if start == "argument" else [sys.executable, "-"]
    # A file in the user's folder must not stand in for one that the worker imports.
    (tmp_path / "sympy.py").write_text("raise RuntimeError")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = run(command, input=SCRIPT, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    started, verdicts, pids = done.stdout.splitlines()
    assert (started, verdicts) == ("started", "[True, False]")
    for pid in pids.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_forked_child_uses_workers_of_its_own(pool):
    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5")
    pool_of_parent = list(pool.workers)
    pid = os.fork()
    if pid == 0:
        pool.forget()  # registered for the module's own pool
        right = is_correct(r"\boxed{\frac{1}{4}}", "0.25") and not set(pool.workers) & set(pool_of_parent)
        pool.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5")
    assert pool.workers == pool_of_parent


def test_worker_ends_with_its_parent():
    script = "import os, signal\n" + SCRIPT + "\nimport sys; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run([sys.executable, "-c", script], env=environment)
    assert done.returncode == -signal.SIGKILL
    for pid in map(int, done.stdout.splitlines()[-1].split()):
        deadline = time.monotonic() + 30
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may stay as a zombie in a container without an init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
