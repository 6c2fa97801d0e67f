"""Tags and words that mark reasoning, the text of tokens, and text that is safe to display."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


THINK_START, THINK_END = "<think>", "</think>"
_ESCAPED = re.compile(r"\\[{}]")
# Words that open a semantic step, by default.
TRIGGERS = ("Wait", "Alternatively")

# A terminal or a page would drop or interpret control characters. Except for tab and newline, they are replaced by
# visible symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Return `text` with control characters replaced, to show model output in a terminal or on a page."""
    return text.translate(_VISIBLE)


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return a tokenizer, or that of the processor of a vision-language model."""
    return cast("PreTrainedTokenizerBase", getattr(processor, "tokenizer", processor))


def completion_text(completion: str | list[dict]) -> str:
    """Return the text of a completion, or what the assistant wrote in a conversation."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion if message["role"] == "assistant")


def split_steps(completion: str, triggers: Sequence[str] = TRIGGERS) -> list[str]:
    """
    Return the text of each semantic step. A trigger word opens a step; joined, the steps are the completion.

    Args:
        completion (`str`):
            The text of a completion.
        triggers (`Sequence[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            The trigger words, as in [`~step_trl.steps.TriggerSegmenter`], which finds the same ones in token ids.

    Returns:
        `list[str]`: One more step than there are triggers. The first is empty if a trigger opens the completion.
    """
    if isinstance(triggers, str) or not triggers or "" in triggers:
        raise ValueError(f"triggers: {triggers!r} is not a list of words. Set, for example, {TRIGGERS!r}.")
    words = "|".join(re.escape(trigger) for trigger in sorted(triggers, key=len))
    starts = [match.start() for match in re.finditer(f"(?<![A-Za-z])(?:{words})(?![A-Za-z])", completion)]
    return [completion[start:end] for start, end in zip([0, *starts], [*starts, len(completion)], strict=True)]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{...}`, or `None`. `\{` and `\}` do not count as braces."""
    braces = _ESCAPED.sub("..", text)
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth, begin = 0, start + len(r"\boxed")
        for end in range(begin, len(text)):
            depth += (braces[end] == "{") - (braces[end] == "}")
            if depth == 0:
                return text[begin + 1 : end]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def token_texts(pieces: Sequence[bytes], token_ids: Sequence[int]) -> list[str]:
    """
    Return the text of each token. A character that is split over several tokens belongs to the one that completes it.

    `pieces` are the [`~step_trl.steps.token_bytes`] of the tokenizer.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(pieces[i] if 0 <= i < len(pieces) else b"") for i in token_ids]
    return [*texts[:-1], texts[-1] + decoder.decode(b"", final=True)] if texts else []
