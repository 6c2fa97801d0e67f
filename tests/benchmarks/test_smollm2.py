"""Problems and traces of the model a hundred times larger. The script itself runs in another test."""

import random
import re

from smollm2.problems import EVALUATION, evaluation_rows, taught_rows, training_rows
from smollm2.teach import tokenize
from smollm2.traces import example
from testbed_model.traces import Piece

from step_trl import testbed
from step_trl.testbed.problems import parse_expression
from step_trl.text import last_boxed


LINE = re.compile(r"(\d+(?: (?:[-+x]) \d+)*) = (\d+)(?!\d| x)")
ROWS = taught_rows(90)


def value(expression):
    left, times, right = expression.partition(" x ")
    return int(left) * int(right) if times else sum(parse_expression(expression))


def test_traces_are_right_but_for_slips_that_are_not_trained_on():
    rng, slips, lines = random.Random(0), 0, 0
    for row in ROWS:
        pieces = example(row, rng)
        text = "".join(piece.text for piece in pieces)
        assert text.startswith("<think>\n") and last_boxed(text) == row["solution"]
        ends = [sum(len(piece.text) for piece in pieces[: place + 1]) for place in range(len(pieces))]
        trained = dict(zip(ends, (piece.trained for piece in pieces), strict=True))
        for line in LINE.finditer(text):
            if value(line[1]) != int(line[2]):
                slips += 1
                # A completion that was cut is one piece, of which nothing is trained on.
                assert not trained[min(end for end in ends if end >= line.end())]
            lines += 1
    assert slips > 10 and lines > 300


def test_sets_have_no_problem_in_common():
    evaluated = {row["question"] for rows in evaluation_rows(64).values() for row in rows}
    taught, trained = ({row["question"] for row in rows} for rows in (taught_rows(1600), training_rows(120)))
    assert len(evaluated) == 64 * len(EVALUATION) and len(taught) == 1600 and len(trained) == 120
    assert not evaluated & taught and not evaluated & trained and not taught & trained


def test_the_loss_is_that_of_trained_pieces():
    tokenizer = testbed.load_tokenizer()
    pieces = [Piece("6 + 9 ="), Piece(" 17", trained=False), Piece(".\n\nWait, 15.")]
    row = tokenize([{"role": "user", "content": "6 + 9?"}], pieces, tokenizer)
    chosen = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(chosen) == f"6 + 9 =.\n\nWait, 15.{tokenizer.eos_token}"
    assert tokenizer.decode(row["input_ids"]).endswith(f" 17.\n\nWait, 15.{tokenizer.eos_token}")
