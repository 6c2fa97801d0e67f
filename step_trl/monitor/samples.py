"""Keep a few completions of the latest generation for display, with their verdicts and advantages."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..rollout import Rollout
from ..steps import Segmenter
from .trace import Trace, render_rollout


ROW = "row"  # key in the inputs of a loss: the position in the generation


def as_text(messages: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a prompt or a completion, which may be a conversation."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


class CompletionSamples:
    """
    The first completions of this process.

    `rollouts` are at most `number` completions of the latest generation. If TRL generated them, they have no probes,
    and log-probabilities only after the loss has been computed.
    """

    def __init__(self, number: int):
        self.number = number
        self.rollouts: list[Rollout] = []
        self._verdicts: list[dict[str, Any]] = []  # arguments of `render_rollout`
        self._advantages: list[float] = []
        self._credits: dict[int, tuple[list[float], list[float]]] = {}

    def note_verdicts(self, rows: Sequence[Mapping[str, Any]], correct: Sequence[bool]) -> None:
        """Store which completions are correct. `rows` are rows of the data set, one per completion."""
        self._verdicts = [
            {
                "problem": as_text(row["prompt"]),
                "solution": None if row.get("solution") is None else str(row["solution"]),
                "correct": right,
            }
            for row, right in zip(rows[: self.number], correct, strict=False)
        ]

    def begin(self, output: Mapping[str, Any], rollouts: Sequence[Rollout] | None) -> None:
        """Take the first completions of a generation, from `rollouts` or from TRL's tensors."""
        self._credits.clear()
        self._advantages = output["advantages"][: self.number].tolist()
        self.rollouts = list(rollouts[: self.number]) if rollouts is not None else self._of_tensors(output)

    def _of_tensors(self, output: Mapping[str, Any]) -> list[Rollout]:
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        made = []
        for prompt, prompt_mask, ids, mask in zip(*(output[name][: self.number] for name in names), strict=True):
            completion = ids[mask.bool()].tolist()
            unknown = array("d", [float("nan")]) * len(completion)
            made.append(Rollout(prompt[prompt_mask.bool()].tolist(), completion, unknown, [False] * len(completion)))
        return made

    def note_loss(self, inputs: Mapping[str, Any], logps: torch.Tensor) -> None:
        """Store the completions' advantages `(B,)` or `(B, T)` and log-probabilities `(B, T)` from the loss."""
        advantages = inputs["advantages"].reshape(len(logps), -1).expand(logps.shape)
        for place, row in enumerate(inputs[ROW].tolist()):
            length = len(self.rollouts[row].completion_ids) if row < len(self.rollouts) else 0
            if row not in self._credits and 0 < length <= logps.size(1):
                self._credits[row] = (advantages[place, :length].tolist(), logps[place, :length].tolist())

    def traces(self, number: int, tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter, title: str) -> list[Trace]:
        """Render the first `number` completions whose loss was computed."""
        return [
            render_rollout(
                self.rollouts[row],
                tokenizer,
                segmenter=segmenter,
                advantage=self._advantages[row],
                selected_advantages=selected,
                token_logps=logps,
                **self._verdicts[row],
                title=f"{title}, completion {row + 1}",
            )
            for row, (selected, logps) in sorted(self._credits.items())[:number]
        ]
