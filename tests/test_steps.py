"""Segmenters against numbers worked by hand and against a plain reference that decodes prefixes."""

from __future__ import annotations

import pytest
import small_tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import crafted_ids
from transformers import ByT5Tokenizer

from step_trl.steps import DelimiterSegmenter, TriggerSegmenter, token_bytes


TRIGGERS = ("Wait", "Alternatively")
LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
OUTSIDE = 10_000_000


# The plain reference. It knows texts and prefixes, no bytes.


def reference_triggers(text: str, triggers=TRIGGERS) -> list[tuple[int, int]]:
    found, position = [], 0
    while position < len(text):
        for word in sorted(triggers, key=len):
            end = position + len(word)
            alone = not LETTERS & {*text[:position][-1:], *text[end : end + 1]}
            if alone and text.startswith(word, position):
                found.append((position, end))
                position = end
                break
        else:
            position += 1
    return found


def reference_delimiters(text: str, delimiter: str) -> list[tuple[int, int]]:
    found, start = [], text.find(delimiter)
    while start >= 0:
        found.append((start, start + len(delimiter)))
        start = text.find(delimiter, start + len(delimiter))
    return found


def reference_tokens(tokenizer, ids: list[int], find) -> list[tuple[int, int]]:
    """First and last token of each match of `find` in the text of `ids`."""
    known = [index if 0 <= index < len(tokenizer) else None for index in ids]
    prefixes = [[index for index in known[:end] if index is not None] for end in range(len(ids) + 1)]
    texts = [tokenizer.decode(prefix, clean_up_tokenization_spaces=False) for prefix in prefixes]

    def holder(position: int) -> int:
        return next(token for token in range(len(ids)) if len(texts[token + 1]) > position)

    return [(holder(start), holder(end - 1)) for start, end in find(texts[-1])]


def reference_boundaries(matches: list[tuple[int, int]]) -> list[int]:
    return sorted({last + 1 for _, last in matches})


def reference_starts(matches: list[tuple[int, int]]) -> list[int]:
    return [min(first for first, last in matches if last + 1 == end) for end in reference_boundaries(matches)]


def reference_step_ids(boundaries: list[int], mask: list[int], end: int | None = None) -> list[int]:
    """`boundaries` and `end` count masked-in tokens only."""
    steps, kept = [], 0
    for keep in mask:
        ended = end is not None and kept >= end
        steps.append(sum(boundary <= kept for boundary in boundaries) if keep and not ended else -1)
        kept += keep
    return steps


@pytest.fixture(scope="module")
def triggers():
    return TriggerSegmenter(small_tokenizers.crafted())


@pytest.fixture(scope="module")
def delimiters():
    return DelimiterSegmenter(small_tokenizers.crafted(), end_text="</think>")


# By hand


@pytest.mark.parametrize(
    ("tokens", "boundaries", "starts", "count"),
    [
        ([], [], [], 0),
        (["a"], [], [], 0),
        (["Wait"], [1], [0], 1),
        (["a", " Wait", ",", " ", "Wait", "."], [2, 5], [1, 4], 2),
        (["a", "Wait"], [], [], 0),
        (["aWait"], [], [], 0),
        (["Wait", "ing"], [], [], 0),
        (["Waiting"], [], [], 0),
        (["wait"], [], [], 0),
        (["WaitWait"], [], [], 0),
        (["Wait", "Wait"], [], [], 0),
        (["Wait Wait"], [1], [0], 2),
        (["Wait.\n\nWait", "ing"], [1], [0], 1),
        (["W", "ait", "."], [2], [0], 1),
        (["W", "a", "it"], [3], [0], 1),
        (["a", "Wa", "it"], [], [], 0),
        ([", Wa", "it", ", Wa", "it"], [2, 4], [0, 2], 2),
        (["Alt", "ern", "atively", ","], [3], [0], 1),
        ([".", "Alternativel", "y", "."], [3], [1], 1),
        (["Alternativel", "y", "ing"], [], [], 0),
        (["Wait", "<|im_end|>", "ing"], [1], [0], 1),
        (["a", "<|im_end|>", "Wait"], [3], [2], 1),
        (["é", "Wait", "é"], [2], [1], 1),
        (["Wait…"], [1], [0], 1),
        (["Wait", 0xC3, 0xA9, "Wait"], [1, 4], [0, 3], 2),
    ],
)
def test_triggers_by_hand(triggers, tokens, boundaries, starts, count):
    ids = crafted_ids(*tokens)
    assert triggers.boundaries(ids) == boundaries
    assert [start for start, _ in triggers.occurrences(ids)] == starts
    assert triggers.count(ids) == count


@pytest.mark.parametrize(
    ("tokens", "boundaries"),
    [
        ([], []),
        (["a", "."], []),
        (["a", ".\n\n", "a"], [2]),
        (["a", "\n", "\n", "a"], [3]),
        (["a", "x\n", "\n\nWait"], [3]),
        ([")\n\nSo", "a"], [1]),
        (["a\n\nb\n\nc", "a"], [1]),
        (["\n\n\n", "a"], [1]),
        (["\n", "\n", "\n", "a"], [2]),
        (["\n\n\n", "\n"], [1, 2]),
        (["\n\n", "\n\n"], [1, 2]),
        (["\n\n\n\n"], [1]),
        (["\n", " ", "\n"], []),
        ([0x0A, 0x0A], [2]),
    ],
)
def test_delimiters_by_hand(delimiters, tokens, boundaries):
    assert delimiters.boundaries(crafted_ids(*tokens)) == boundaries


def test_spans_cover_all_tokens(delimiters):
    ids = crafted_ids("a", ".\n\n", ")\n\nSo", "a", "\n", "\n", "y")
    assert delimiters.spans(ids) == [(0, 2), (2, 3), (3, 6), (6, 7)]
    assert delimiters.spans(ids[:2]) == [(0, 2)]
    assert delimiters.spans([]) == []


def test_ids_outside_the_vocabulary_are_no_text(triggers, delimiters):
    a, wait, newline, ing = crafted_ids("a", "Wait", "\n", "ing")
    assert triggers.boundaries([OUTSIDE, wait, -100, OUTSIDE]) == [2]
    assert triggers.count([wait, -100, ing]) == 0
    assert triggers.count([a, OUTSIDE, wait]) == 0
    assert delimiters.boundaries([newline, -1, newline, OUTSIDE, a]) == [3]
    size = len(small_tokenizers.crafted())
    for padding in (size, size + 1, size + 2):  # a model's vocabulary is often larger than its tokenizer's
        assert delimiters.boundaries([newline, padding, newline]) == [3]
    assert delimiters.spans([OUTSIDE, -100]) == [(0, 2)]


def test_step_ids_skip_masked_tokens(delimiters):
    a, newline, blank = crafted_ids("a", "\n", "\n\n")
    ids = torch.tensor([[a, newline, blank, newline, a], [a, a, blank, a, blank], [blank, blank, a, a, a]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = [[0, 0, -1, 0, 1], [-1, 0, 0, 1, 1], [0, 1, -1, -1, -1]]
    assert delimiters.step_ids(ids, mask).tolist() == expected
    assert delimiters.step_ids(ids, mask.bool()).dtype == torch.long


def test_rows_do_not_match_across_their_ends(triggers, delimiters):
    wa, it, newline, a = crafted_ids("Wa", "it", "\n", "a")
    ids = torch.tensor([[a, newline], [newline, a]])
    assert delimiters.step_ids(ids, torch.ones_like(ids)).tolist() == [[0, 0], [0, 0]]
    ids = torch.tensor([[newline, wa], [it, newline]])
    assert triggers.counts(ids, torch.ones_like(ids)).tolist() == [0, 0]
    wait, ing = crafted_ids("Wait", "ing")
    ids = torch.tensor([[wait, OUTSIDE], [ing, wait], [wait, newline]])
    assert triggers.counts(ids, torch.ones_like(ids)).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        (["a", ".\n\n", "a", "</think>", ".\n\n", "a"], [0, 0, 1, -1, -1, -1]),
        (["a", ".\n\n", "</", "think", ">", "a"], [0, 0, -1, -1, -1, -1]),
        (["a", ".</think>", "a"], [0, -1, -1]),
        (["</th", "ink>\n\n", "a"], [-1, -1, -1]),
        (["a", "</", "think", "a"], [0, 0, 0, 0]),
        (["</think>", "a", "</think>"], [-1, -1, -1]),
    ],
)
def test_end_text_ends_the_steps(delimiters, tokens, steps):
    ids = torch.tensor([crafted_ids(*tokens)])
    assert delimiters.step_ids(ids, torch.ones_like(ids)).tolist() == [steps]
    assert -1 not in DelimiterSegmenter(small_tokenizers.crafted()).step_ids(ids, torch.ones_like(ids))


def test_end_text_is_of_its_own_row(delimiters):
    ids = torch.tensor([crafted_ids("a", "</think>"), crafted_ids("a", ".\n\n"), crafted_ids("</", "think")])
    assert delimiters.step_ids(ids, torch.ones_like(ids)).tolist() == [[0, -1], [0, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0)])
def test_empty_batches(triggers, delimiters, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    assert delimiters.step_ids(ids, ids).shape == shape
    assert triggers.step_ids(ids, ids).shape == shape
    assert triggers.counts(ids, ids).tolist() == [0] * shape[0]


@pytest.mark.parametrize("make", [small_tokenizers.trained, small_tokenizers.in_pieces])
@pytest.mark.parametrize("text", [*small_tokenizers.SENTENCES, "Zürich → 7 €.\n\nWait… nöWait. Wait"])
def test_tokenized_text(make, text):
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    triggers, delimiters = TriggerSegmenter(tokenizer), DelimiterSegmenter(tokenizer)
    assert triggers.count(ids) == len(reference_triggers(text))
    for segmenter, find in (
        (triggers, reference_triggers),
        (delimiters, lambda text: reference_delimiters(text, "\n\n")),
    ):
        spans = segmenter.spans(ids)
        assert [token for start, end in spans for token in range(start, end)] == list(range(len(ids)))
        assert segmenter.boundaries(ids) == reference_boundaries(reference_tokens(tokenizer, ids, find))


def test_merges_across_blank_lines_and_triggers_in_pieces():
    assert b".\n\n" in token_bytes(small_tokenizers.trained())
    tokenizer = small_tokenizers.in_pieces()
    ids = tokenizer(". Alternatively, so")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[2:5] == ["Alt", "ern", "atively"]
    segmenter = TriggerSegmenter(tokenizer)
    assert segmenter.occurrences(ids) == [(2, 5)]


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([], 0),
        (["a", "."], 2),
        (["a", "Wait"], 2),
        (["a", "W"], 1),
        (["W", "a"], 0),
        (["W", "a", "."], 3),
        (["a", ", Wa"], 1),
        (["W", "W"], 1),
        (["W", "Alt", "ern"], 1),
        (["."] * 40 + ["Alternativel"], 40),
        (["Alternativel", "<|im_end|>"], 2),
    ],
)
def test_what_may_become_a_trigger(triggers, tokens, start):
    assert triggers.unfinished(crafted_ids(*tokens)) == start


def test_own_triggers_and_delimiters():
    tokenizer = small_tokenizers.in_pieces()
    segmenter = TriggerSegmenter(tokenizer, ("Wait", "Wait a moment", "Hmm…", "Doch"))
    assert segmenter.count(tokenizer("Wait a moment. Hmm… Doch! Hmm. Dochs (Wait)")["input_ids"]) == 4
    ids = tokenizer("Wait a moment.")["input_ids"]
    assert tokenizer.decode(ids[: segmenter.boundaries(ids)[0]]) == "Wait"
    assert TriggerSegmenter(tokenizer, ("a.c",)).count(tokenizer("abc a.c")["input_ids"]) == 1
    ids = tokenizer("1 → 2 →→ 3")["input_ids"]
    spans = DelimiterSegmenter(tokenizer, "→").spans(ids)
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == ["1 →", " 2 →", "→", " 3"]


def test_sentencepiece_tokens():
    tokenizer = small_tokenizers.sentencepiece()
    ids = tokenizer.convert_tokens_to_ids
    segmenter = TriggerSegmenter(tokenizer)
    assert segmenter.boundaries(ids(["▁x", "▁Wait", "▁x", "▁Wa", "it", "▁Alter", "natively"])) == [2, 5, 7]
    assert segmenter.count(ids(["x", "Wait", "▁Wa", "it", "ing"])) == 0
    assert segmenter.count(ids(["x", "Wait", "<0x41>", "▁Wait", "<0x2E>"])) == 1
    delimiters = DelimiterSegmenter(tokenizer)
    assert delimiters.boundaries(ids(["x", "<0x0A>", "<0x0A>", "x", "\n", "<0x0A>", "x"])) == [3, 6]
    assert token_bytes(tokenizer)[ids("▁x")] == b" x"
    row = torch.tensor([ids(["x", "<0x0A>", "\n", "Wait", "</think>", "x"])])
    steps = DelimiterSegmenter(tokenizer, end_text="</think>").step_ids(row, torch.ones_like(row))
    assert steps.tolist() == [[0, 0, 0, 1, -1, -1]]
    metaspace = small_tokenizers.sentencepiece(byte_tokens=False)
    ids = metaspace.convert_tokens_to_ids(["▁Wait", "▁Wait", "ing", "\n\n", "Wait"])
    assert TriggerSegmenter(metaspace).boundaries(ids) == [1, 5]


def test_token_bytes_of_every_byte():
    tokenizer = small_tokenizers.crafted()
    pieces = token_bytes(tokenizer)
    alphabet = small_tokenizers.bytes_to_char()
    single = {byte: tokenizer.convert_tokens_to_ids(char) for byte, char in alphabet.items()}
    assert len(single) >= 240
    assert all(pieces[index] == bytes([byte]) for byte, index in single.items())
    assert pieces[tokenizer.convert_tokens_to_ids("<|im_end|>")] == b"<|im_end|>"


def test_arguments_are_checked():
    tokenizer = small_tokenizers.crafted()
    for triggers in ((), "Wait", ("Wait", "")):
        with pytest.raises(ValueError, match="triggers"):
            TriggerSegmenter(tokenizer, triggers)
    with pytest.raises(ValueError, match="delimiter"):
        DelimiterSegmenter(tokenizer, "")
    with pytest.raises(ValueError, match="end_text"):
        DelimiterSegmenter(tokenizer, end_text="")
    with pytest.raises(ValueError, match=r"tokenizer: .*WordPiece"):
        TriggerSegmenter(small_tokenizers.wordpiece())
    with pytest.raises(ValueError, match="tokenizer: ByT5Tokenizer"):
        TriggerSegmenter(ByT5Tokenizer())
    with pytest.raises(ValueError, match="shapes"):
        TriggerSegmenter(tokenizer).counts(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4))


# Against the reference. Each byte drawn stands for a fragment: one crafted token, or several that belong together.

FRAGMENTS = [
    *([index] for token in small_tokenizers.CRAFTED_TOKENS for index in crafted_ids(token)),
    *([index] for index in crafted_ids(*small_tokenizers.SPECIAL_TOKENS, *small_tokenizers.THINK_TOKENS)),
    *([index] for index in crafted_ids(0xC3, 0xA9, 0xE2, 0x80, 0xA6, 0xF0, 0x0A, 0x57)),
    *([index] for index in (OUTSIDE, -100, len(small_tokenizers.crafted()))),
    crafted_ids("Alt", "ern", "atively"),
    crafted_ids("W", "a", "it"),
    crafted_ids("</", "think", ">"),
    crafted_ids("</th", "ink>\n\n"),
    crafted_ids(0xE2, 0x80, 0xA6),
]


def fragments(draws: bytes) -> list[int]:
    return [index for draw in draws for index in FRAGMENTS[draw % len(FRAGMENTS)]]


@st.composite
def batches(draw):
    """Two rows of one length with a mask; a draw of the mask is 0 in one of four cases."""
    rows = [fragments(draw(st.binary(max_size=10))) for _ in range(2)]
    length = max(map(len, rows))
    rows = [row + [crafted_ids("a")[0]] * (length - len(row)) for row in rows]
    masks = [[int(byte % 4 > 0) for byte in draw(st.binary(min_size=length, max_size=length))] for _ in range(2)]
    return rows, masks


@settings(max_examples=2_000)
@given(st.binary(max_size=14))
@example(bytes(range(len(FRAGMENTS))))
def test_segmenters_equal_the_reference(triggers, delimiters, draws):
    ids, tokenizer = fragments(draws), small_tokenizers.crafted()
    matches = reference_tokens(tokenizer, ids, reference_triggers)
    assert triggers.count(ids) == len(matches)
    assert triggers.boundaries(ids) == reference_boundaries(matches)
    assert triggers.occurrences(ids) == list(zip(reference_starts(matches), triggers.boundaries(ids)))
    boundaries = reference_boundaries(
        reference_tokens(tokenizer, ids, lambda text: reference_delimiters(text, "\n\n"))
    )
    assert delimiters.boundaries(ids) == boundaries
    for segmenter in (triggers, delimiters):
        spans = segmenter.spans(ids)
        assert [token for start, end in spans for token in range(start, end)] == list(range(len(ids)))
        assert all(start < end for start, end in spans)
        assert {start for start, _ in spans} <= {0, *segmenter.boundaries(ids)}


@settings(max_examples=1_000)
@given(batches())
def test_batches_equal_the_reference(triggers, delimiters, batch):
    rows, masks = batch
    tokenizer = small_tokenizers.crafted()
    ids, mask = torch.tensor(rows, dtype=torch.long), torch.tensor(masks, dtype=torch.long)
    counts, by_trigger, by_delimiter = [], [], []
    for row, row_mask in zip(rows, masks, strict=True):
        kept = [index for index, keep in zip(row, row_mask, strict=True) if keep]
        matches = reference_tokens(tokenizer, kept, reference_triggers)
        counts.append(len(matches))
        by_trigger.append(reference_step_ids(reference_boundaries(matches), row_mask))
        closings = reference_tokens(tokenizer, kept, lambda text: reference_delimiters(text, "\n\n"))
        ends = reference_tokens(tokenizer, kept, lambda text: reference_delimiters(text, "</think>"))
        end = ends[0][0] if ends else None
        by_delimiter.append(reference_step_ids(reference_boundaries(closings), row_mask, end))
    assert triggers.counts(ids, mask).tolist() == counts
    assert triggers.step_ids(ids, mask).tolist() == by_trigger
    assert delimiters.step_ids(ids, mask).tolist() == by_delimiter
