"""
Segmenters split completions into steps. They map boundaries in the text to token ids exactly.

A segmenter knows the bytes of every token. It joins the bytes of a whole batch into one buffer, searches that buffer
for the boundary, and maps each match back to the tokens that contain its first and its last byte. Nothing is decoded
or tokenised again, so it needs no special cases for a boundary in the middle of a token, a trigger of several tokens,
or a character whose bytes are split over tokens.

The text of a row consists of its unmasked tokens only. A special or added token stands for its own content
(`<|im_end|>`), and an id outside the vocabulary for no text. Matches never extend across the end of a row.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .text import TRIGGERS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# This byte never occurs in UTF-8 text, so no pattern matches across it. It is not a letter: a word may end before it.
_ROW_END = b"\xff"


def _byte_level_bytes(tokens: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # takes seconds to import

    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    for token, index in tokens.items():
        try:
            yield index, bytes([alphabet[char] for char in token])
        except KeyError:  # like the decoder of `tokenizers`
            yield index, token.encode()


def _sentencepiece_bytes(tokens: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    for token, index in tokens.items():
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        yield index, bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """
    Return the bytes of the text that each token id stands for, `b""` for unused ids.

    For byte-level BPE tokens (GPT-2, Llama 3, Qwen), the bytes are exact. In SentencePiece-like vocabularies (Llama 2,
    Gemma, T5), "▁" is a space, even if decoding would strip it from the start of the text, and `<0xNN>` is a byte. The
    tokenizer must be backed by the `tokenizers` library.
    """
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    decoders = {part["type"] for part in state.get("decoders", [state])}
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if index not in added}
    if "ByteLevel" in decoders:
        pieces = dict(_byte_level_bytes(vocabulary)) | added
    elif decoders & {"Metaspace", "ByteFallback"}:
        pieces = dict(_sentencepiece_bytes(vocabulary)) | added
    else:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} with decoder {sorted(decoders)} is not supported, because the "
            "bytes of its tokens are unknown. Use a fast tokenizer with byte-level BPE or SentencePiece tokens."
        )
    return [pieces.get(index, b"") for index in range(max(pieces) + 1)]


class _BatchText(NamedTuple):
    """The text of a batch of token ids, one row after the other."""

    data: bytes  # of all rows, each followed by `_ROW_END`
    ends: np.ndarray  # (B * (T + 1),), the end of each token's bytes. The last column of each row is its `_ROW_END`.

    def find(self, pattern: re.Pattern[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last token of each match `(N,)`, as positions in the flat `(B, T + 1)` grid."""
        spans = np.array([match.span() for match in pattern.finditer(self.data)], dtype=np.int64).reshape(-1, 2)
        # side="right" skips tokens without bytes
        first = np.searchsorted(self.ends, spans[:, 0], side="right")
        last = np.searchsorted(self.ends, spans[:, 1] - 1, side="right")
        return first, last


class _ByteTable:
    """The bytes of all tokens in one array, with two more entries for "no text" and for the end of a row."""

    def __init__(self, pieces: Sequence[bytes]):
        self.no_text, self.row_end = len(pieces), len(pieces) + 1
        pieces = [*pieces, b"", _ROW_END]
        self.bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self.lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.offsets = np.cumsum(self.lengths) - self.lengths

    def join(self, token_ids: np.ndarray, mask: np.ndarray) -> _BatchText:
        """Return the text of `token_ids` `(B, T)` where `mask` `(B, T)` is true."""
        rows, columns = token_ids.shape
        grid = np.full((rows, columns + 1), self.row_end, dtype=np.int64)
        known = mask & (token_ids >= 0) & (token_ids < self.no_text)
        grid[:, :columns] = np.where(known, token_ids, self.no_text)
        flat = grid.ravel()
        lengths = self.lengths[flat]
        ends = np.cumsum(lengths)
        source = np.repeat(self.offsets[flat] - (ends - lengths), lengths)
        source += np.arange(len(source))
        return _BatchText(self.bytes[source].tobytes(), ends)


class Segmenter:
    """
    Splits completions into steps at every match of a pattern in their text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the token ids (byte-level BPE, or SentencePiece-like).
        pattern (`re.Pattern[bytes]`):
            The pattern that closes a step. Matches are found from left to right and do not overlap.
        end_text (`str`, *optional*):
            The text that ends the part of a completion with steps, such as `"</think>"`. Only [`step_ids`] uses it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pattern: re.Pattern[bytes], end_text: str | None = None
    ) -> None:
        if end_text == "":
            raise ValueError("end_text: must not be empty, got ''. Set a text such as '</think>', or None.")
        self._pattern = pattern
        self._end_pattern = None if end_text is None else re.compile(re.escape(end_text.encode()))
        self._table = _ByteTable(token_bytes(tokenizer))

    def _join(self, token_ids: torch.Tensor, mask: torch.Tensor) -> tuple[_BatchText, np.ndarray]:
        """Return the text of a batch, and its mask as an array of bools `(B, T)`."""
        if token_ids.ndim != 2 or token_ids.shape != mask.shape:
            raise ValueError(
                f"token_ids, mask: shapes {tuple(token_ids.shape)} and {tuple(mask.shape)} differ or are not (B, T). "
                "Pad the rows to the same length, and pass a mask of the same shape."
            )
        keep = mask.bool().cpu().numpy()
        return self._table.join(token_ids.cpu().numpy(), keep), keep

    def _find(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the first token of each boundary's match, and the end of the token that completes it."""
        row = np.asarray(token_ids, dtype=np.int64).reshape(1, -1)
        first, last = self._table.join(row, np.ones(row.shape, dtype=bool)).find(self._pattern)
        # If a token completes several matches, they are one boundary, which starts with the first of them.
        last, index = np.unique(last, return_index=True)
        return first[index].tolist(), (last + 1).tolist()

    def boundaries(self, token_ids: Sequence[int]) -> list[int]:
        """
        Return the positions where steps of one completion end, in strictly increasing order.

        Each is the exclusive end of the token that completes a boundary. A token that completes two counts once.
        """
        return self._find(token_ids)[1]

    def spans(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """
        Return the steps of one completion, split at the [`boundaries`], as the start and the exclusive end of each.

        The ranges are not empty, are in order and cover all tokens.
        """
        cuts = sorted({0, *self.boundaries(token_ids), len(token_ids)})
        return list(itertools.pairwise(cuts))

    def count(self, token_ids: Sequence[int]) -> int:
        """
        Return the number of boundaries in the text of one completion, which has `1 + count` semantic steps.

        Several that the same token completes count separately.
        """
        row = torch.as_tensor(token_ids, dtype=torch.long).reshape(1, -1)
        return int(self.counts(row, torch.ones_like(row)))

    def counts(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the [`count`] `(B,)` of each row of a batch, see [`step_ids`]."""
        text, keep = self._join(token_ids, mask)
        rows, columns = keep.shape
        counts = np.bincount(text.find(self._pattern)[1] // (columns + 1), minlength=rows)
        return torch.from_numpy(counts).to(token_ids.device)

    def step_ids(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Return the step that each token of a batch belongs to.

        Args:
            token_ids (`torch.LongTensor` of shape `(B, T)`):
                The padded completions.
            mask (`torch.Tensor` of shape `(B, T)`):
                The mask, 0 for tokens that are not part of the text (padding, tokens of an environment). They are
                removed before the search for boundaries.

        Returns:
            `torch.LongTensor` of shape `(B, T)`: 0, 1, 2, ... along each row. It is -1 where `mask` is 0, and starting
            with the first token of `end_text`.
        """
        text, keep = self._join(token_ids, mask)
        rows, columns = keep.shape
        closes = np.zeros((rows, columns + 1), dtype=np.int64)
        closes.ravel()[text.find(self._pattern)[1]] = 1
        steps = closes.cumsum(axis=1) - closes  # boundaries before the token
        if self._end_pattern is not None:
            ended = np.zeros((rows, columns + 1), dtype=bool)
            ended.ravel()[text.find(self._end_pattern)[0]] = True
            steps[np.logical_or.accumulate(ended, axis=1)] = -1
        steps = np.where(keep, steps[:, :columns], -1)
        return torch.from_numpy(steps).to(token_ids.device)


class TriggerSegmenter(Segmenter):
    """
    Splits completions into steps that end with a trigger word, the sign that a model starts to check itself.

    A trigger counts if there is no ASCII letter directly before or after it, so "Waiting", "await" and "WaitWait"
    contain none. The start and the end of the text do not count as letters. Overlapping triggers count once: the
    leftmost, or the shorter of two that start at the same position.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the token ids.
        triggers (`Sequence[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            The trigger words, case-sensitive.

    Example:

    ```python
    >>> segmenter = TriggerSegmenter(tokenizer)
    >>> ids = tokenizer("It is 7. Wait, no. Wait!")["input_ids"]
    >>> segmenter.count(ids)
    2
    >>> [tokenizer.decode(ids[start:end]) for start, end in segmenter.spans(ids)]
    ['It is 7. Wait', ', no. Wait', '!']
    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, triggers: Sequence[str] = TRIGGERS) -> None:
        if isinstance(triggers, str) or not triggers or "" in triggers:
            raise ValueError(f"triggers: {triggers!r} is not a list of words. Set, for example, {TRIGGERS}.")
        words = [re.escape(word) for word in sorted((trigger.encode() for trigger in set(triggers)), key=len)]
        # The letter before the word is checked after matching the word: a pattern that starts with a look-behind is
        # twice as slow.
        whole_words = b"|".join(word + b"(?<![A-Za-z]" + word + b")" for word in words)
        super().__init__(tokenizer, re.compile(b"(?:" + whole_words + b")(?![A-Za-z])"))
        self._starts = {word[:end] for word in (one.encode() for one in triggers) for end in range(1, len(word))}

    def occurrences(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """
        Return for each of the [`boundaries`] of one completion the index of the first token that contains a character
        of its trigger, and the boundary. `token_ids[:start]` is the text before the trigger.
        """
        return list(zip(*self._find(token_ids), strict=True))

    def unfinished(self, token_ids: Sequence[int]) -> int:
        """
        Return the index of the first token with a character of a trigger that further tokens may complete, or the
        number of tokens if there is none.
        """
        longest = max(map(len, self._starts), default=0)
        offset = max(0, len(token_ids) - longest)  # a token with text has at least one byte
        row = np.asarray(token_ids[offset:], dtype=np.int64).reshape(1, -1)
        text = self._table.join(row, np.ones_like(row, dtype=bool))
        data = text.data.removesuffix(_ROW_END)
        for length in range(min(longest, len(data)), 0, -1):
            if data[-length:] in self._starts:
                return offset + int(np.searchsorted(text.ends, len(data) - length, side="right"))
        return len(token_ids)


class DelimiterSegmenter(Segmenter):
    r"""
    Splits completions into steps that end with a delimiter, by default a blank line. The token that completes the
    delimiter belongs to the step that it closes.

    Delimiters are found as in `str.split`: from left to right and without overlap, so the boundaries of a prefix stay
    the same when the text continues. `"\n\n\n"` is one delimiter, followed by a newline that opens the next step;
    `"\n\n\n\n"` is two delimiters, and the second is a separate step if another token completes it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the token ids.
        delimiter (`str`, *optional*, defaults to `"\n\n"`):
            The text that closes a step.
        end_text (`str`, *optional*):
            The text that ends the thought, such as `"</think>"`, in one token or several. In [`step_ids`], all tokens
            are -1 starting with the one that contains the first character of its first occurrence.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, delimiter: str = "\n\n", *, end_text: str | None = None
    ) -> None:
        if not delimiter:
            raise ValueError(f"delimiter: must not be empty, got {delimiter!r}. Set a text such as '\\n\\n'.")
        super().__init__(tokenizer, re.compile(re.escape(delimiter.encode())), end_text)
