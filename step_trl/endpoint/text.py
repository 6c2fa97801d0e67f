"""The text of a completion as its tokens arrive: thought and answer apart, and no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..steps import token_bytes
from ..text import THINK_END, THINK_START
from .prompts import Thought


class Delta(NamedTuple):
    """Further text of a completion."""

    reasoning: str = ""
    content: str = ""


def visible_pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes of each token, `b""` for special tokens other than the tags of a thought."""
    pieces = token_bytes(tokenizer)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tags = {THINK_START.encode(), THINK_END.encode()}
    return [b"" if i in special and piece not in tags else piece for i, piece in enumerate(pieces)]


class CompletionText:
    """
    Splits a completion into its thought and its answer while it grows.

    Text that may be the start of `</think>` or of a stop string is held back until it is certain. Stop strings are
    looked for in the answer only, if thoughts are apart. Newlines that open a thought or an answer are left out.

    Args:
        pieces (`Sequence[bytes]`):
            The [`visible_pieces`] of the tokenizer.
        stop (`Sequence[str]`):
            Strings that end the completion. Their text is left out.
        thought (`"open"`, `"closed"` or `"none"`, *optional*):
            How the prompt ends: in an open thought, behind a thought, or neither, so that the model may open one. By
            default, thoughts are not taken apart.

    Attributes:
        tokens (`int`), reasoning_tokens (`int`):
            Number of tokens so far, and of those that belong to the thought, its tags included.
        stopped (`bool`):
            Whether a stop string has ended the completion. Further tokens do not count.
    """

    def __init__(self, pieces: Sequence[bytes], stop: Sequence[str] = (), thought: Thought | None = None):
        self.tokens = self.reasoning_tokens = 0
        self.stopped = False
        self._pieces = pieces
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._part = {"open": "thought", "none": "start"}.get(thought or "", "answer")
        self._skips_newlines = self._part == "thought"
        self._pending = ""

    def add(self, token_ids: Sequence[int]) -> Delta:
        """Add tokens. Returns the text that is certain."""
        state = self._decoder.getstate()
        text = self._pending + self._decode(token_ids)
        wanted = (THINK_END,) if self._part == "thought" else self._stop
        if self._part != "start" and not self.stopped and not any(one in text for one in wanted):
            self._count(len(token_ids))
            self._pending = text
            return self._advance()
        # The token in which a part ends counts: one token at a time.
        self._decoder.setstate(state)
        deltas = [self._add_one(token_id) for token_id in token_ids]
        return Delta("".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas))

    def _add_one(self, token_id: int) -> Delta:
        if self.stopped:
            return Delta()
        self._count(1)
        self._pending += self._decode([token_id])
        return self._advance()

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self._part == "thought":
            self.reasoning_tokens += tokens

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._pieces[i] for i in token_ids if i < len(self._pieces)))

    def end(self) -> Delta:
        """Return the text that was held back, as the completion has ended."""
        if self.stopped:
            return Delta()
        self._pending += self._decoder.decode(b"", final=True)
        self._skip_newlines()
        if self._part == "thought":
            rest, self._pending = self._pending, ""
            return Delta(reasoning=rest)
        self._part = "answer"  # also of a completion that is all white space, which may be a stop string
        taken = self._take_answer()
        rest, self._pending = "" if self.stopped else self._pending, ""
        return Delta(content=taken + rest)

    def _advance(self) -> Delta:
        if self._part == "start":
            text = self._pending.lstrip()
            if text.startswith(THINK_START):
                self._pending, self._part, self._skips_newlines = text[len(THINK_START) :], "thought", True
                self.reasoning_tokens = self.tokens
            elif not THINK_START.startswith(text):
                self._part = "answer"
            else:
                return Delta()
        self._skip_newlines()
        if self._part == "answer":
            return Delta(content=self._take_answer())
        thought, end, rest = self._pending.partition(THINK_END)
        if not end:
            return Delta(reasoning=self._take(_held_back(self._pending, (THINK_END,))))
        self._pending, self._part, self._skips_newlines = rest, "answer", True
        self._skip_newlines()
        return Delta(thought, self._take_answer())

    def _take_answer(self) -> str:
        found = [place for place in (self._pending.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._pending[: min(found)]
        return self._take(_held_back(self._pending, self._stop))

    def _take(self, held_back: int) -> str:
        """Take all pending text but the last characters."""
        end = len(self._pending) - held_back
        taken, self._pending = self._pending[:end], self._pending[end:]
        return taken

    def _skip_newlines(self) -> None:
        if self._skips_newlines:
            self._pending = self._pending.lstrip("\n")
            self._skips_newlines = not self._pending


def _held_back(text: str, wanted: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that is the start of a wanted string."""
    longest = max(map(len, wanted), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in wanted):
            return length
    return 0
