"""Prompts for refinements, verdicts, and the choice of a refinement."""

import pytest

from step_trl.rollout.refine import (
    critique_request,
    indicative_critique,
    question_of,
    read_verdict,
    refinement_request,
    select_refinement,
    with_question,
)


def test_the_first_correct_refinement_is_kept():
    assert select_refinement([0, 1, 1]) == select_refinement([0, 1, 1], seed=3) == 1


def test_without_a_correct_one_it_is_the_first_of_the_best_or_a_random_one():
    assert select_refinement([0, 0, 0]) == 0
    assert select_refinement([0, 0.4, 0.4]) == 1
    chosen = [select_refinement([0, 0, 0], seed) for seed in range(30)]
    assert {*chosen} == {0, 1, 2}
    assert chosen == [select_refinement([0, 0, 0], seed) for seed in range(30)]


@pytest.mark.parametrize(
    ("critique", "verdict"),
    [
        ("Step 2 is wrong.\nVerdict: incorrect", False),
        ("**Verdict:** Correct.", True),
        ("Verdict: correct? No.\n\nverdict: INCORRECT", False),
        ("The answer is correct.", None),
    ],
)
def test_the_last_verdict_counts(critique, verdict):
    assert read_verdict(critique) is verdict


def test_a_request_has_all_parts_and_braces_are_text():
    request = refinement_request("What is {x}?", "It is \\boxed{4}.", indicative_critique(False, "5"))
    for part in (
        "What is {x}?",
        "It is \\boxed{4}.",
        "The earlier solution is incorrect.",
        "The correct answer is 5.",
    ):
        assert part in request
    assert request.endswith("\\boxed{}.")
    assert "The correct answer" not in indicative_critique(True)
    asked = critique_request("Why?", "Because.", "A reference")
    assert "A reference" in asked and "Verdict: incorrect" in asked
    assert "reference" not in critique_request("Why?", "Because.")


def test_a_question_is_the_last_message():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert question_of(messages) == question_of("Why?") == "Why?"
    assert with_question("Why?", "How?") == "How?"
    assert with_question(messages, "How?") == [messages[0], {"role": "user", "content": "How?"}]
    assert messages[1]["content"] == "Why?"
