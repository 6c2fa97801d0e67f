"""What counts as a right answer, and what does not."""

import pytest

from step_trl.evaluation.graders import grade, is_choice, is_text
from step_trl.text import last_boxed


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}} or \boxed{x_{1}}", "x_{1}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\} ]}", r"\} ]"),
        ("no box", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    "text",
    [
        r"so \boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B)}}",
        r"\boxed{(B)}",
        r"\boxed{B. seven}",
        r"\boxed{B)}",
        "The answer is (B).",
        "The final answer is: **B**",
        "Answer: B",
        "The correct answer is option B.",
        "So the answer is **B**: seven.",
        "A is wrong and C too.\n\n(B)",
        "A is wrong and C too.\nB",
    ],
)
def test_a_letter_that_is_given_as_the_answer_counts(text):
    assert is_choice(text, "B")
    assert not any(is_choice(text, letter) for letter in "ACDE")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B is one of the options, but I have to look at the others first",
        "The answer is hard to tell: B or C",
        r"\boxed{A or B}",
        r"\boxed{(A), (B)}",
        r"\boxed{Because}",
        "The answer is Because",
        "(A) or (B)",
        "B could be",
        "Let me check the options.\nA) Smith is first",
        "A) is incorrect, so the choice must be B",
        "Option A) is wrong; B",
        "A. The first statement contradicts rule 2",
    ],
)
def test_a_stray_letter_does_not(text):
    assert not any(is_choice(text, letter) for letter in "ABCDE")


def test_a_thought_that_was_cut_off_has_no_answer():
    completions = ["Maybe the answer is (B)", "Maybe (A).</think>The answer is (B)", "The answer is (B)</think>"]
    assert grade("choice", completions, ["B"] * 3, needs_end_of_thinking=True) == [False, True, False]
    assert grade("choice", completions, ["B"] * 3, needs_end_of_thinking=False) == [True, True, False]
    assert grade("math", [r"\boxed{7}", r"</think>\boxed{7}"], ["7"] * 2, needs_end_of_thinking=True) == [False, True]


@pytest.mark.parametrize(
    ("text", "solution", "right"),
    [
        (r"\boxed{True}", "True", True),
        (r"\boxed{\text{valid}}", "valid", True),
        (r"\boxed{invalid}", "valid", False),
        ("The answer is Yes.", "Yes", True),
        (r"\boxed{ant  bee cat}", "ant bee cat", True),
        (r"\boxed{] ) }", "] )", True),
        (r"\boxed{\} ]}", "} ]", True),
        ("The answer is } ].", "} ]", True),
        ("The letters are these.\nant bee cat", "ant bee cat", True),
        (r"\boxed{B}", "(B)", True),
        (r"\boxed{(C)}", "(B)", False),
        (r"\boxed{-24}", "-24", True),
        (r"\boxed{24}", "-24", False),
    ],
)
def test_texts(text, solution, right):
    assert is_text(text, solution) is right


def test_an_empty_text_is_no_answer():
    assert not is_text("", "True")
    assert not is_choice("", "A")
