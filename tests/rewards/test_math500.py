r"""
MATH-500 is loaded as published, and its own answers and solutions are right for their problems, and wrong for others.

The data set is no part of the package: it lies beside the repository, in `../shared/data/math500.jsonl`.
"""

import json
from pathlib import Path

import pytest

from step_trl.data import load_problems
from step_trl.evaluation import load_benchmark
from step_trl.evaluation.graders import grade


FILE = Path(__file__).parents[3] / "shared" / "data" / "math500.jsonl"


@pytest.fixture(scope="module")
def rows():
    if not FILE.is_file():
        pytest.skip(f"MATH-500 is absent: lay its test.jsonl at {FILE} to test the grading of all its answers.")
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    assert len(rows) == 500
    return rows


def test_it_is_a_benchmark_and_a_training_set(rows, tmp_path):
    """A training set is loaded by column, and this one has an answer beside the solution."""
    (tmp_path / "test.jsonl").symlink_to(FILE)
    benchmark, problems = load_benchmark("math500", tmp_path), load_problems(tmp_path, split="test")
    answers = [row["answer"] for row in rows]
    assert benchmark["solution"] == problems["solution"] == answers
    assert benchmark["problem"] == [row["unique_id"] for row in rows]
    for loaded in (benchmark, problems):
        asked = [prompt[-1]["content"] for prompt in loaded["prompt"]]
        assert all(row["problem"] in question for row, question in zip(rows, asked, strict=True))


def boxed(row):
    return rf"So it is that.\n</think>\n\nThe answer is \boxed{{{row['answer']}}}."


def value(row):
    """Two neighbouring problems in this data set have equal answers, written as `5` and as `x=5`."""
    return row["answer"].removeprefix("x=")


def test_every_answer_is_right_for_its_own_problem_only(rows):
    answers = [row["answer"] for row in rows]
    neighbours = [*rows[1:], rows[0]]
    completions = [boxed(row) for row in rows] + [row["solution"] for row in rows] + [boxed(row) for row in neighbours]
    verdicts = grade("math", completions, answers * 3, needs_end_of_thinking=False)
    own, solutions, others = verdicts[:500], verdicts[500:1000], verdicts[1000:]
    assert [answer for answer, right in zip(answers, own) if not right] == []
    assert [answer for answer, right in zip(answers, solutions) if not right] == []
    equal = [value(row) == value(neighbour) for row, neighbour in zip(rows, neighbours)]
    assert 0 < sum(equal) < 10 and others == equal
