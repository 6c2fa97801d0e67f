"""Small tokenizers of each kind, built without files, for tests."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]
SENTENCES = [
    "First add 3 and 4 (that is 7).\n\nSo the total is 7.\n\nWait, let me check that again.\n\n",
    "Alternatively, count from 3 upwards: 4, 5, 6, 7.\n\nWait, this gives 7 again.\n\n",
    "We are waiting for a result (7)\n\nSo it stays 7.\n\nAlternatively, stop.\n\n",
]
# Tokens that make life hard: boundaries inside tokens, triggers in pieces, words that only contain a trigger.
CRAFTED_TOKENS = [
    *("W", "Wa", "it", "ait", "Wait", " Wait", "WaitWait", "Wait Wait", "Waiting", "wait", "aWa", "ing", ", Wa"),
    *("A", "Alt", "ern", "atively", "Alternatively", "Alternativel", "y", "a", " ", ".", "|", "aWait"),
    *("\n", "\n\n", "\n\n\n", "\n\n\n\n", ".\n\n", ")\n\nSo", "\n\nWait", "Wait.\n\nWait", "x\n", "a\n\nb\n\nc"),
    *("</", "think", ">", "</th", "ink>\n\n", ".</think>", "é", "Wait…"),
]


def _alphabet() -> dict[str, int]:
    return {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _add_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])


@cache
def trained() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across blank lines (".\n\n"), and whole-word triggers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    _add_tokens(tokenizer)
    return _wrap(tokenizer)


@cache
def in_pieces() -> PreTrainedTokenizerFast:
    """Byte-level BPE that writes "Alternatively" as "Alt", "ern", "atively" and everything else in bytes."""
    merges = [("A", "l"), ("Al", "t"), ("e", "r"), ("er", "n")]
    merges += [("a", "t"), ("i", "v"), ("at", "iv"), ("e", "l"), ("el", "y"), ("ativ", "ely")]
    vocabulary = _alphabet()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer)
    return _wrap(tokenizer)


@cache
def crafted() -> PreTrainedTokenizerFast:
    """Byte-level vocabulary of all bytes and `CRAFTED_TOKENS`, without merges: made to be decoded, not to encode."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = _alphabet()
    for token in CRAFTED_TOKENS:
        vocabulary.setdefault(level.pre_tokenize_str(token)[0][0], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    _add_tokens(tokenizer)
    return _wrap(tokenizer)


def crafted_ids(*tokens: str | int) -> list[int]:
    """Ids in [`crafted`] of tokens given by their text; numbers stand for single bytes."""
    tokenizer = crafted()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = []
    for token in tokens:
        if isinstance(token, int):
            text = bytes_to_char()[token]
        elif token in (*SPECIAL_TOKENS, *THINK_TOKENS):
            text = token
        else:
            text = level.pre_tokenize_str(token)[0][0]
        index = tokenizer.convert_tokens_to_ids(text)
        assert index is not None, token
        ids.append(index)
    return ids


@cache
def bytes_to_char() -> dict[int, str]:
    """The byte-level alphabet, as `tokenizers` itself writes the bytes of characters of all lengths."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for code in [*range(0x800), *range(0x800, 0x110000, 0x800)]:
        if not 0xD800 <= code < 0xE000:
            text = chr(code)
            table.update(zip(text.encode(), level.pre_tokenize_str(text)[0][0]))
    return table


@cache
def sentencepiece(byte_tokens: bool = True) -> PreTrainedTokenizerFast:
    """Vocabulary with "▁" for spaces; with byte tokens as in Gemma, or without as in T5."""
    words = ["▁Wait", "Wait", "▁Wa", "it", "ing", "▁x", "x", ".", "\n", "\n\n", "▁", "▁Alter", "natively"]
    tokens = ["<unk>", *words, *(f"<0x{byte:02X}>" for byte in range(256) if byte_tokens)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=byte_tokens))
    if byte_tokens:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.decoder = decoders.Metaspace()
    _add_tokens(tokenizer)
    return _wrap(tokenizer)


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """A kind that is not supported."""
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "wait": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
