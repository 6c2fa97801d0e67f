"""
What a step is: segmenters that map boundaries in the text to token ids, exactly.

A segmenter knows the bytes of every token. It joins the bytes of a whole batch into one buffer, searches that buffer
for the boundary, and maps each match back to the tokens that hold its first and its last byte. Nothing is decoded and
nothing is tokenised again, so a boundary in the middle of a token, a trigger of several tokens, or a character whose
bytes are split over tokens need no special care.

The text of a row is made of its masked-in tokens only. A special or added token is its own content (`<|im_end|>`), an
id outside the vocabulary is nothing. Rows never match across their ends.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .text import TRIGGERS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Never part of UTF-8 text, so no pattern matches across it; not a letter, so a word may end before it.
_ROW_END = b"\xff"


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(tokens: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    alphabet = _byte_level_alphabet()
    for token, index in tokens.items():
        try:
            yield index, bytes([alphabet[char] for char in token])
        except KeyError:  # as the decoder of `tokenizers` does
            yield index, token.encode()


def _sentencepiece_bytes(tokens: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    for token, index in tokens.items():
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        yield index, bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """
    Bytes of the text that each token id stands for; `b""` for ids that are not in use.

    Byte-level BPE tokens (GPT-2, Llama 3, Qwen) are exact. In SentencePiece-like vocabularies (Llama 2, Gemma, T5) "▁"
    is a space, also where decoding would strip it from the start of the text, and `<0xNN>` is a byte.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer backed by the `tokenizers` library.

    Returns:
        `list[bytes]`: indexed by token id.
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
            f"tokenizer: {type(tokenizer).__name__} with decoder {sorted(decoders)} is not supported, since the "
            "bytes of its tokens are not known. Use a fast tokenizer with byte-level BPE or SentencePiece tokens."
        )
    return [pieces.get(index, b"") for index in range(max(pieces) + 1)]


class _BatchText:
    """
    Text of a batch of token ids, one row after the other.

    Attributes:
        data (`bytes`):
            Bytes of all rows, each followed by `_ROW_END`.
        ends (`np.ndarray` of shape `(B * (T + 1),)`):
            Where the bytes of each token end in `data`; the last column of each row is its `_ROW_END`.
    """

    def __init__(self, data: bytes, ends: np.ndarray):
        self.data = data
        self.ends = ends

    def find(self, pattern: re.Pattern[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the flattened `(B, T + 1)` grid of the first and the last token of each match, `(N,)` each."""
        spans = np.array([match.span() for match in pattern.finditer(self.data)], dtype=np.int64).reshape(-1, 2)
        # side="right" passes over tokens without bytes
        first = np.searchsorted(self.ends, spans[:, 0], side="right")
        last = np.searchsorted(self.ends, spans[:, 1] - 1, side="right")
        return first, last


class _ByteTable:
    """Bytes of all tokens in one array; two more entries stand for "no text" and for the end of a row."""

    def __init__(self, pieces: Sequence[bytes]):
        self.no_text, self.row_end = len(pieces), len(pieces) + 1
        pieces = [*pieces, b"", _ROW_END]
        self.bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self.lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.offsets = np.cumsum(self.lengths) - self.lengths

    def join(self, token_ids: np.ndarray, mask: np.ndarray) -> _BatchText:
        """Text of `token_ids` `(B, T)` where `mask` `(B, T)` is true."""
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
    Cuts completions into steps wherever a pattern is completed in their text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the token ids (byte-level BPE, or SentencePiece-like).
        pattern (`re.Pattern[bytes]`):
            What closes a step. Matches are taken from left to right and do not overlap.
        end_text (`str`, *optional*):
            Text that ends the part of a completion that has steps, such as `"</think>"`. Only [`step_ids`] heeds it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pattern: re.Pattern[bytes], end_text: str | None = None
    ) -> None:
        if end_text == "":
            raise ValueError("end_text: '' ends every text at once. Give a text such as '</think>', or None.")
        self._pattern = pattern
        self._end_pattern = None if end_text is None else re.compile(re.escape(end_text.encode()))
        self._table = _ByteTable(token_bytes(tokenizer))

    def _join(self, token_ids: torch.Tensor, mask: torch.Tensor) -> tuple[_BatchText, np.ndarray]:
        """Text of a batch, and its mask as a `(B, T)` array of bools."""
        if token_ids.ndim != 2 or token_ids.shape != mask.shape:
            raise ValueError(
                f"token_ids, mask: shapes {tuple(token_ids.shape)} and {tuple(mask.shape)} differ or are not (B, T). "
                "Pad the rows to one length and give the mask of the same shape."
            )
        keep = mask.bool().cpu().numpy()
        return self._table.join(token_ids.cpu().numpy(), keep), keep

    def _find(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """First token of each boundary's match, and the end of the token that completes it."""
        row = np.asarray(token_ids, dtype=np.int64).reshape(1, -1)
        first, last = self._table.join(row, np.ones(row.shape, dtype=bool)).find(self._pattern)
        # a token that completes several matches is one boundary, that of the first of them
        last, index = np.unique(last, return_index=True)
        return first[index].tolist(), (last + 1).tolist()

    def boundaries(self, token_ids: Sequence[int]) -> list[int]:
        """
        Where steps end.

        Args:
            token_ids (`Sequence[int]`):
                Token ids of one completion.

        Returns:
            `list[int]`: for each boundary the end, exclusive, of the token that completes it; strictly increasing. A
            token that completes two boundaries counts once.
        """
        return self._find(token_ids)[1]

    def spans(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """
        Steps as ranges of tokens, cut at the [`boundaries`].

        Args:
            token_ids (`Sequence[int]`):
                Token ids of one completion.

        Returns:
            `list[tuple[int, int]]`: start and end, exclusive, of each step. The ranges are not empty, follow each
            other and cover all tokens.
        """
        cuts = sorted({0, *self.boundaries(token_ids), len(token_ids)})
        return list(itertools.pairwise(cuts))

    def count(self, token_ids: Sequence[int]) -> int:
        """
        Number of boundaries in the text of one completion; it has `1 + count` semantic steps.

        Args:
            token_ids (`Sequence[int]`):
                Token ids of one completion.

        Returns:
            `int`: the number of matches, also of those that one token completes together.
        """
        row = torch.as_tensor(token_ids, dtype=torch.long).reshape(1, -1)
        return int(self.counts(row, torch.ones_like(row)))

    def counts(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        [`count`] of each row of a batch.

        Args:
            token_ids (`torch.LongTensor` of shape `(B, T)`):
                Completions, padded.
            mask (`torch.Tensor` of shape `(B, T)`):
                0 for tokens that are no part of the text.

        Returns:
            `torch.LongTensor` of shape `(B,)`: the number of matches.
        """
        text, keep = self._join(token_ids, mask)
        rows, columns = keep.shape
        counts = np.bincount(text.find(self._pattern)[1] // (columns + 1), minlength=rows)
        return torch.from_numpy(counts).to(token_ids.device)

    def step_ids(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        The step that each token of a batch belongs to.

        Args:
            token_ids (`torch.LongTensor` of shape `(B, T)`):
                Completions, padded.
            mask (`torch.Tensor` of shape `(B, T)`):
                0 for tokens that are no part of the text (padding, tokens of an environment). They are taken out
                before boundaries are looked for.

        Returns:
            `torch.LongTensor` of shape `(B, T)`: 0, 1, 2, ... along each row; -1 where `mask` is 0, and from the token
            on that starts `end_text`.
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
    Steps that end with a trigger word, the sign that a model starts to check itself.

    A trigger counts when no ASCII letter stands directly before or after it, so "Waiting", "await" and "WaitWait" hold
    none; the start and the end of the text are no letters. Triggers that share characters count once: the leftmost
    one, the shorter one of two that start together.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the token ids.
        triggers (`Sequence[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            The words, case-sensitive.

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
            raise ValueError(f"triggers: {triggers!r} is no list of words. Set for example {TRIGGERS}.")
        words = [re.escape(word) for word in sorted((trigger.encode() for trigger in set(triggers)), key=len)]
        # The letter before is looked for behind the word: a pattern that opens with a look-behind is twice as slow.
        whole_words = b"|".join(word + b"(?<![A-Za-z]" + word + b")" for word in words)
        super().__init__(tokenizer, re.compile(b"(?:" + whole_words + b")(?![A-Za-z])"))

    def occurrences(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """
        Where the triggers of the [`boundaries`] are: `token_ids[:start]` is the path without its trigger.

        Args:
            token_ids (`Sequence[int]`):
                Token ids of one completion.

        Returns:
            `list[tuple[int, int]]`: for each boundary the index of the first token that holds a character of its
            trigger, and the boundary.
        """
        return list(zip(*self._find(token_ids), strict=True))


class DelimiterSegmenter(Segmenter):
    r"""
    Steps that end with a delimiter, by default a blank line. The token that completes the delimiter belongs to the
    step it closes.

    Delimiters are found as `str.split` finds them: from left to right, without overlap, so that the boundaries of a
    prefix stay when the text goes on. `"\n\n\n"` is one delimiter and a newline that opens the next step, `"\n\n\n\n"`
    is two; the second makes a step of its own where another token completes it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the token ids.
        delimiter (`str`, *optional*, defaults to `"\n\n"`):
            The text that closes a step.
        end_text (`str`, *optional*):
            Ends the thought, as `"</think>"` does, be it one token or several: in [`step_ids`] all tokens from the one
            on that holds the first character of its first occurrence are -1. `boundaries` and `spans` do not heed it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, delimiter: str = "\n\n", *, end_text: str | None = None
    ) -> None:
        if not delimiter:
            raise ValueError(f"delimiter: {delimiter!r} closes no step. Set a text such as '\\n\\n'.")
        super().__init__(tokenizer, re.compile(re.escape(delimiter.encode())), end_text)
