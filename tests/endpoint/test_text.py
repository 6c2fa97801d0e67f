"""The text of a completion: thought and answer apart, stop strings, and the same text however its tokens arrive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_trl import testbed
from step_trl.endpoint.text import CompletionText, Delta, visible_pieces


# Tags whole and in parts, newlines, the bytes of one character, a special token's nothing.
PIECES = ["<think>", "</think>", "</", "think", ">", "<", "\n", "\n\n", "a", "b", "ab", " ", "é", ""]
BYTES = [*(piece.encode() for piece in PIECES), "é".encode()[:1], "é".encode()[1:]]
STOPS = [(), ("ab",), ("b\n", "ba"), ("\n\n",), ("é",)]


def ids_of(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def read(token_ids, sizes=(), **options) -> tuple[Delta, CompletionText]:
    """Add tokens in groups of these sizes, and the rest in one."""
    text, parts, start = CompletionText(BYTES, **options), [], 0
    for size in [*sizes, len(token_ids)]:
        parts.append(text.add(token_ids[start : start + size]))
        start += size
    parts.append(text.end())
    return Delta(*map("".join, zip(*parts))), text


@pytest.mark.parametrize(
    ("thought", "pieces", "reasoning", "content", "reasoning_tokens"),
    [
        ("open", ["a", "b", "</think>", "\n\n", "ab"], "ab", "ab", 3),
        ("open", ["\n", "a", "\n", "</think>", "a", "\n\n"], "a\n", "a\n\n", 4),
        ("open", ["a", "</", "think", ">", "b"], "a", "b", 4),
        ("open", ["a", "</", "a", "b"], "a</ab", "", 4),
        ("open", ["a", "</", "think"], "a</think", "", 3),
        ("open", ["a", "</think>", "b", "</think>"], "a", "b</think>", 2),
        ("open", [], "", "", 0),
        ("closed", ["a", "</think>", "b"], "", "a</think>b", 0),
        ("none", ["<think>", "\n", "a", "</think>", "b"], "a", "b", 4),
        ("none", ["\n", "<think>", "a"], "a", "", 3),
        ("none", ["<", "think", ">", "a", "</think>", "b"], "a", "b", 5),
        ("none", ["<", "a", "</think>"], "", "<a</think>", 0),
        ("none", ["\n", "a"], "", "\na", 0),
        ("none", ["<", "think"], "", "<think", 0),
        (None, ["<think>", "\n", "a", "</think>", "b"], "", "<think>\na</think>b", 0),
    ],
)
def test_thought_and_answer_by_hand(thought, pieces, reasoning, content, reasoning_tokens):
    delta, text = read(ids_of(*pieces), thought=thought)
    assert delta == Delta(reasoning, content)
    assert (text.tokens, text.reasoning_tokens) == (len(pieces), reasoning_tokens)


@pytest.mark.parametrize(
    ("thought", "stop", "pieces", "content", "tokens"),
    [
        (None, ("ab",), ["b", "a", "b", "a"], "b", 3),
        (None, ("ab", "b"), ["a", "ab", "a"], "a", 2),
        (None, ("é",), ["a", "é", "b"], "a", 2),
        (None, ("bb",), ["a", "b"], "ab", 2),
        (None, ("\n\n",), ["a", "\n", "\n", "b"], "a", 3),
        ("none", ("\n\n",), ["\n\n"], "", 1),  # it could become a thought until the end
        ("open", ("ab",), ["ab", "</think>", "b", "ab", "a"], "b", 4),  # the thought goes on
        (
            "open",
            ("\n\n",),
            ["a", "</think>", "\n\n", "b", "\n\n", "a"],
            "b",
            5,
        ),  # those before the answer do not count
    ],
)
def test_stop_strings_by_hand(thought, stop, pieces, content, tokens):
    delta, text = read(ids_of(*pieces), stop=stop, thought=thought)
    assert (delta.content, text.tokens) == (content, tokens)
    assert text.stopped == (tokens < len(pieces) or pieces[-1] in stop)


@given(
    st.lists(st.integers(0, len(BYTES) - 1), max_size=20),
    st.lists(st.integers(1, 4), max_size=20),
    st.sampled_from(STOPS),
    st.sampled_from(["open", "closed", "none", None]),
)
@settings(max_examples=400)
def test_text_does_not_depend_on_how_its_tokens_arrive(token_ids, sizes, stop, thought):
    whole, text = read(token_ids, stop=stop, thought=thought)
    pieces, same = read(token_ids, sizes, stop=stop, thought=thought)
    assert pieces == whole and vars(same).keys() == vars(text).keys()
    assert (same.tokens, same.reasoning_tokens, same.stopped) == (text.tokens, text.reasoning_tokens, text.stopped)
    assert not any(one in whole.content for one in stop)
    if thought is None and not text.stopped:
        assert whole.content == b"".join(BYTES[i] for i in token_ids).decode(errors="replace")


def test_text_is_passed_on_at_once():
    """Only what may become a tag or a stop string waits."""
    text = CompletionText(BYTES, ("bbb",), "open")
    assert text.add(ids_of("a", "b")) == Delta("ab", "")
    assert text.add(ids_of("a", "</")) == Delta("a", "")
    assert text.add(ids_of("a", "<")) == Delta("</a", "")
    assert text.add(ids_of("</think>", "\n", "a")) == Delta("<", "a")
    assert text.add(ids_of("b", "b")) == Delta()
    assert text.add(ids_of("a", "é")) == Delta("", "bbaé")


def test_special_tokens_have_no_text():
    tokenizer = testbed.load_tokenizer()
    ids = tokenizer.encode("<|im_start|>1 + 1<think>\n2</think>3<|im_end|>", add_special_tokens=False)
    text = CompletionText(visible_pieces(tokenizer))
    assert text.add([*ids, 10**6]) == Delta("", tokenizer.decode(ids, skip_special_tokens=True))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1 + 1<think>\n2</think>3"
