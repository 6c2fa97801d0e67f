"""
The math accuracy reward, with a reliable time limit.

math-verify limits its run time with a SIGALRM handler, which works only in the main thread and cannot interrupt C code
(such as a call for `9^{9^{9^9}}`). So grading runs in child processes (`grading.py`), which the kernel kills after the
time limit. They are plain `subprocess` children that exchange JSON lines: unlike `multiprocessing` children, they
never import the parent's `__main__` (notebooks, scripts without a main guard) or torch, and unlike forked processes,
they hold no CUDA state. They start when first needed and are kept for later calls.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any, cast

from ..text import THINK_END, completion_text
from ..thoughts import answer_block
from . import grading
from .grading import Grade, boxed_integer, compare_integers


class _Worker:
    """A child process that grades or reads one text at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, grading.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # do not import from the script's own folder
            start_new_session=True,  # Ctrl-C should only reach the parent
        )
        self.requests = cast("IO[str]", self.process.stdin)
        self.replies = cast("IO[str]", self.process.stdout)
        self.ready = False

    def ask(self, request: Sequence[Any]) -> str:
        """The reply to a request as `grading.py` reads it, empty if the worker ran into a limit."""
        self.ready = self.ready or bool(self.replies.readline())
        if not self.ready:
            raise RuntimeError("A grading worker exited while it was starting; see standard error.")
        with contextlib.suppress(BrokenPipeError):  # the worker just died: there will be no reply
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
        return self.replies.readline()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):  # a request is still in the buffer
            self.requests.close()


class _Pool:
    """Workers that are kept between calls. Calls from several threads take turns."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the workers without stopping them: in a forked child, they belong to the parent."""
        self.workers: list[_Worker] = []  # the idle ones
        self.lock = threading.Lock()

    def close(self) -> None:
        while self.workers:
            self.workers.pop().stop()

    def ask(self, requests: Sequence[Sequence[Any]], workers: int, killed: Any) -> list[Any]:
        """Replies to requests; `killed` where a worker ran into a limit."""
        with self.lock, ThreadPoolExecutor(workers) as threads:
            return list(threads.map(partial(self._ask, killed), requests))

    def _ask(self, killed: Any, request: Sequence[Any]) -> Any:
        try:
            worker = self.workers.pop()
        except IndexError:  # none is idle; asking first would race with the other threads
            worker = _Worker()
        if worker.process.poll() is not None:  # it died between two calls
            worker.stop()
            worker = _Worker()
        reply = worker.ask(request)
        if not reply:
            worker.stop()
            worker = _Worker()
        self.workers.append(worker)
        return json.loads(reply) if reply else killed


_POOL = _Pool()
atexit.register(_POOL.close)
os.register_at_fork(after_in_child=_POOL.forget)


def grade_all(
    pairs: Sequence[tuple[str, str]], timeout: float = 5.0, workers: int | None = None, strict_latex: bool = False
) -> list[Grade]:
    """
    Grade pairs of answer text (without the thought) and solution, each within a time limit. Equal pairs are graded
    once. The options are those of [`math_accuracy_reward`].
    """
    workers = _number_of_workers(timeout, workers)
    grades = {pair: compare_integers(*pair) for pair in pairs}
    hard = [pair for pair, verdict in grades.items() if verdict is None]
    requests = [(*pair, timeout, strict_latex) for pair in hard]
    replies = _POOL.ask(requests, workers, killed=Grade(False, killed=True))
    grades.update((pair, Grade(*reply)) for pair, reply in zip(hard, replies, strict=True))
    return [cast("Grade", grades[pair]) for pair in pairs]


def extract_answers(
    completions: Sequence[str] | Sequence[list[dict]],
    *,
    require_end_of_thinking: bool = False,
    timeout: float = 5.0,
    workers: int | None = None,
) -> list[str | None]:
    r"""
    The final answer that [`math_accuracy_reward`] reads in each completion, `None` where there is none.

    Two answers are the same string where math-verify reads the same expression: `\frac12`, `1/2` and `0.5`, or `4` and
    `4.0`. What takes mathematics to see is not: `\sqrt{12}` and `2\sqrt{3}`, or `x = 4` and `4`.

    Args:
        completions (`Sequence[str]` or `Sequence[list[dict]]`):
            Completions, plain or as messages.
        require_end_of_thinking (`bool`, *optional*, defaults to `False`):
            Whether a completion without `</think>` has no answer; otherwise all of its text is read.
        timeout, workers (*optional*):
            As in [`math_accuracy_reward`]. A completion that takes longer has no answer.
    """
    workers = _number_of_workers(timeout, workers)
    texts = [answer_text(completion, require_end_of_thinking) for completion in completions]
    answers = {text: boxed_integer(text) for text in texts}
    hard = [text for text, answer in answers.items() if answer is None]
    requests = [(text, None, timeout, False) for text in hard]
    answers.update(zip(hard, _POOL.ask(requests, workers, killed=None), strict=True))
    return [answers[text] for text in texts]


def _number_of_workers(timeout: float, workers: int | None) -> int:
    if workers is None:
        workers = min(4, os.cpu_count() or 1)
    if timeout <= 0 or workers < 1:
        raise ValueError(f"`timeout` must be positive and `workers` at least 1, got {timeout} and {workers}.")
    return workers


def answer_text(completion: str | list[dict], require_end_of_thinking: bool = False) -> str:
    """Return the part of a completion that is graded: the text after the thought."""
    message = {"content": completion} if isinstance(completion, str) else completion[-1]
    _, tag, answer = (message.get("content") or "").rpartition(THINK_END)
    # If TRL can parse the responses of a chat template, it moves a closed thought out of the content.
    closed = tag or message.get("reasoning_content")
    return answer if closed or not require_end_of_thinking else ""


def math_accuracy_reward(
    completions: list[str] | list[list[dict]],
    solution: list[str],
    *,
    require_end_of_thinking: bool = False,
    strict_latex: bool = False,
    timeout: float = 5.0,
    workers: int | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float]:
    r"""
    Return 1.0 for completions whose answer equals the solution according to math-verify, and 0.0 for others.

    This reward works like TRL's `accuracy_reward`, with these differences: only the text after the last `</think>` is
    graded; "Answer: 42" counts without LaTeX; answers such as `\frac43` and solutions that are bare LaTeX values are
    understood; a solution that cannot be parsed gives 0.0 instead of `None` (the share of these is logged); and the
    time limit holds in any thread and for any input.

    Args:
        completions (`list[str]` or `list[list[dict]]`), solution (`list[str]`):
            The completions, as text or as messages, and the solution of each one's problem.
        require_end_of_thinking (`bool`, *optional*, defaults to `False`):
            Whether a completion without `</think>` is wrong. Otherwise, all of its text is graded.
        strict_latex (`bool`, *optional*, defaults to `False`):
            Whether an answer such as `\frac43` or `\boxed{42.}`, which LaTeX typesets as `\frac{4}{3}` and 42, is
            wrong, as in TRL's `accuracy_reward`.
        timeout (`float`, *optional*, defaults to `5.0`):
            The time limit for one completion, in seconds. A completion that takes longer is wrong.
        workers (`int`, *optional*):
            The maximum number of grading processes. Defaults to the number of cores, at most 4.
        log_metric, **kwargs:
            Passed by TRL, which logs the means of `accuracy/unparsed_solutions`, `accuracy/unparsed_answers` and
            `accuracy/timeouts`, 0 or 1 for each completion. Other columns are ignored.

    Example:
    ```python
    >>> math_accuracy_reward([r"<think>1/2?</think>It is \boxed{0.5}."], [r"\frac{1}{2}"])
    [1.0]
    ```

    To change an option, pass a `functools.partial` of this function as the trainer's reward function.
    """
    texts = [answer_text(completion, require_end_of_thinking) for completion in completions]
    grades = grade_all(list(zip(texts, solution, strict=True)), timeout, workers, strict_latex)
    if log_metric is not None:
        for grade in grades:
            log_metric("accuracy/unparsed_solutions", float(not grade.solution_parsed))
            log_metric("accuracy/unparsed_answers", float(not grade.answer_parsed))
            log_metric("accuracy/timeouts", float(grade.killed))
    return [float(grade.correct) for grade in grades]


def block_text(text: str) -> str:
    """Return what is graded of a completion: its `<answer>` block, boxed, or else the text after the thought."""
    block = answer_block(text)
    if block is None:
        return answer_text(text)
    return block if "\\boxed" in block else rf"\boxed{{{block}}}"


def think_answer_accuracy_reward(
    completions: list[str] | list[list[dict]],
    solution: list[str],
    *,
    strict: bool = False,
    timeout: float = 5.0,
    workers: int | None = None,
    **kwargs,
) -> list[float]:
    """
    Return 1.0 for completions whose `<answer>` block equals the solution, and 0.0 for others (TON, arXiv 2505.16854).

    The last block after the thought counts, and it equals the solution if it is the same text or, according to
    math-verify, the same value. Without a block, this is [`math_accuracy_reward`].

    With `strict=True`, the released code's rule decides: math-verify reads the whole completion, or the first block,
    if it is on one line, is the same text as the solution. The other arguments are those of [`math_accuracy_reward`].
    """
    texts = [completion_text(completion) for completion in completions]
    if strict:
        blocks = [match[1].strip() if (match := re.search("<answer>(.*?)</answer>", text)) else None for text in texts]
        graded = texts
    else:
        blocks = [answer_block(text) for text in texts]
        graded = [block_text(text) for text in texts]
    grades = grade_all(list(zip(graded, solution, strict=True)), timeout, workers)
    return [
        float(grade.correct or block == right.strip())
        for grade, block, right in zip(grades, blocks, solution, strict=True)
    ]
