"""
The math accuracy reward, with a time limit that holds.

math-verify limits its time by a SIGALRM handler of the calling process: this works in the main thread only, and not in
the middle of C code (`9^{9^{9^9}}` is one such call). So grading runs in child processes (`grading.py`) that the
kernel ends. They are plain `subprocess` children that speak JSON lines: unlike `multiprocessing`'s they never import
the parent's `__main__` (notebooks, scripts without a main guard) nor torch, and unlike a forked process they hold
nothing of CUDA. They start when first needed and stay for the next call.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

from ..text import THINK_END
from . import grading
from .grading import Grade, compare_integers


class _Worker:
    """A child process that grades one pair at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, grading.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # its own folder is no place to import from
            start_new_session=True,  # Ctrl-C is for the parent
        )
        self.replies = cast("IO[str]", self.process.stdout)
        self.ready = False
        self.task: int | None = None

    def ask(self, task: int, request: Sequence[Any]) -> None:
        self.task = task
        requests = cast("IO[str]", self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it died just now: reading finds the end of its replies
            requests.write(json.dumps(request) + "\n")
            requests.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):  # a request was still in the buffer
            cast("IO[str]", self.process.stdin).close()


class _Pool:
    """Workers that outlive a call. Calls from several threads take turns."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew without touching the workers: in a forked child they belong to the parent."""
        self.workers: list[_Worker] = []
        self.lock = threading.Lock()

    def close(self) -> None:
        while self.workers:
            self.workers.pop().stop()

    def grade(
        self, pairs: Sequence[tuple[str, str]], timeout: float, workers: int, strict_latex: bool = False
    ) -> list[Grade]:
        requests = [(*pair, timeout, strict_latex) for pair in pairs]
        with self.lock:
            try:
                return self._grade(requests, min(workers, len(pairs)))
            except BaseException:
                self.close()  # an unread reply would be taken for the next call's
                raise

    def _grade(self, requests: Sequence[Sequence[Any]], workers: int) -> list[Grade]:
        grades: dict[int, Grade] = {}
        waiting = deque(enumerate(requests))

        def feed(worker: _Worker) -> None:
            if waiting:
                worker.ask(*waiting.popleft())

        self._prepare(workers)
        with selectors.DefaultSelector() as selector:
            for slot, worker in enumerate(self.workers[:workers]):
                selector.register(worker.replies, selectors.EVENT_READ, slot)
                if worker.ready:
                    feed(worker)
            while len(grades) < len(requests):
                for key, _ in selector.select():
                    worker = self.workers[key.data]
                    reply = worker.replies.readline()
                    if reply:
                        if worker.task is not None:
                            grades[worker.task] = Grade(*json.loads(reply))
                        worker.ready, worker.task = True, None
                        feed(worker)
                    elif worker.ready:
                        if worker.task is not None:
                            grades[worker.task] = Grade(False, killed=True)
                        selector.unregister(worker.replies)
                        self._replace(key.data)
                        selector.register(self.workers[key.data].replies, selectors.EVENT_READ, key.data)
                    else:
                        raise RuntimeError("A grading worker ended while it started; see standard error.")
        return [grades[task] for task in range(len(requests))]

    def _prepare(self, workers: int) -> None:
        """Start workers up to this number, and new ones for those that died between calls."""
        for slot, worker in enumerate(self.workers):
            if worker.process.poll() is not None:
                self._replace(slot)
        while len(self.workers) < workers:
            self.workers.append(_Worker())

    def _replace(self, slot: int) -> None:
        self.workers[slot].stop()
        self.workers[slot] = _Worker()


_POOL = _Pool()
atexit.register(_POOL.close)
os.register_at_fork(after_in_child=_POOL.forget)


def grade_all(
    pairs: Sequence[tuple[str, str]], timeout: float = 5.0, workers: int | None = None, strict_latex: bool = False
) -> list[Grade]:
    """
    Grade pairs of answer text and solution, equal pairs once, each within a time limit.

    Args:
        pairs (`Sequence[tuple[str, str]]`):
            Text of the answer without the thought, and solution.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds that one pair may take.
        workers (`int`, *optional*):
            Most processes to use at once. Defaults to the number of cores, at most 4.
        strict_latex (`bool`, *optional*, defaults to `False`):
            As in [`math_accuracy_reward`].
    """
    if workers is None:
        workers = min(4, os.cpu_count() or 1)
    if timeout <= 0 or workers < 1:
        raise ValueError(f"`timeout` must be positive and `workers` at least 1, got {timeout} and {workers}.")
    grades = {pair: compare_integers(*pair) for pair in pairs}
    hard = [pair for pair, verdict in grades.items() if verdict is None]
    grades.update(zip(hard, _POOL.grade(hard, timeout, workers, strict_latex), strict=True))
    return [cast("Grade", grades[pair]) for pair in pairs]


def is_correct(text: str, solution: str, timeout: float = 5.0) -> bool:
    """Whether `text` (without a thought) answers a problem whose solution is `solution`."""
    return grade_all([(text, solution)], timeout)[0].correct


def answer_text(completion: str | list[dict], require_end_of_thinking: bool = False) -> str:
    """The part of a completion that is graded: what follows the thought."""
    message = {"content": completion} if isinstance(completion, str) else completion[-1]
    _, tag, answer = (message.get("content") or "").rpartition(THINK_END)
    # TRL moves a closed thought out of the content for the chat templates whose responses it can parse.
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
    Reward function that is 1.0 where the answer equals the solution by math-verify, else 0.0.

    Like TRL's `accuracy_reward`, with these differences: only the text after the last `</think>` is graded,
    "Answer: 42" counts without LaTeX, answers such as `\frac43` and bare LaTeX values as solutions are understood, an
    unreadable solution gives 0.0 and not `None` (its share is logged), and the time limit holds in any thread and
    against any input.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or as messages.
        solution (`list[str]`):
            Solution of each completion's problem.
        require_end_of_thinking (`bool`, *optional*, defaults to `False`):
            Whether a completion without `</think>` is wrong; otherwise all of its text is graded.
        strict_latex (`bool`, *optional*, defaults to `False`):
            Whether an answer such as `\frac43` or `\boxed{42.}`, which LaTeX typesets as `\frac{4}{3}` and 42, is
            wrong, as it is to TRL's `accuracy_reward`.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds that one completion may take. One that takes longer is wrong.
        workers (`int`, *optional*):
            Most processes to grade in at once. Defaults to the number of cores, at most 4.
        log_metric (`callable`, *optional*):
            Passed by TRL, which logs the mean. Receives `accuracy/unparsed_solutions`, `accuracy/unparsed_answers`
            and `accuracy/timeouts` of each completion, 0 or 1.
        **kwargs:
            Ignored: other columns and what else TRL passes.

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
