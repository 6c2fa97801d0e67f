"""Tags and words that mark reasoning, the text of tokens, and text that is safe to display."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


THINK_START, THINK_END = "<think>", "</think>"
# Words that open a semantic step, by default.
TRIGGERS = ("Wait", "Alternatively")

# A terminal or a page would drop or interpret control characters. Except for tab and newline, they are replaced by
# visible symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Return `text` with control characters replaced, to show model output in a terminal or on a page."""
    return text.translate(_VISIBLE)


def completion_text(completion: str | list[dict]) -> str:
    """Return the text of a completion, or what the assistant wrote in a conversation."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion if message["role"] == "assistant")


def token_texts(pieces: Sequence[bytes], token_ids: Sequence[int]) -> list[str]:
    """
    Return the text of each token. A character that is split over several tokens belongs to the one that completes it.

    `pieces` are the [`~step_trl.steps.token_bytes`] of the tokenizer.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(pieces[i] if 0 <= i < len(pieces) else b"") for i in token_ids]
    return [*texts[:-1], texts[-1] + decoder.decode(b"", final=True)] if texts else []
