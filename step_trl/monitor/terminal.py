"""Show a training in the terminal: a live view on a terminal, plain lines in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..rollout import Rollout
from ..steps import Segmenter, token_bytes
from ..text import token_texts, visible
from .status import RunStatus, short_number, short_time


_STEP_STYLES = ("cyan", "green", "yellow", "magenta", "blue")
_LAST_CHARACTERS = 1200  # of a completion to show


class TerminalView(TrainerCallback):
    """
    Show the phase, progress, tokens/s, exits, remaining time, the most important metrics, and a completion with
    coloured steps. If the output is not a terminal, print one line per log.

    Args:
        status ([`RunStatus`]):
            The status of the training.
        console (`rich.console.Console`, *optional*):
            The console to print to. By default, one on stderr.
    """

    def __init__(self, status: RunStatus, console: Console | None = None):
        self.status = status
        self.console = Console(stderr=True) if console is None else console
        self._live: Live | None = None
        self._completion: Text | None = None

    @property
    def live(self) -> bool:
        """Whether the view is live, on a terminal."""
        return self._live is not None

    def show(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter) -> None:
        """Set the completion to show."""
        self._completion = coloured_steps(rollout.completion_ids, rollout.injected, tokenizer, segmenter)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.console.is_terminal:
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
            self._live.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self._live is None and self.status.headline_values(logs or {}):
            self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stop, and leave the last view on the screen. This is also called if the training fails."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self) -> str:
        """Return the last logs in one line."""
        status = self.status
        parts = [f"{label} {short_number(value)}" for label, value in status.headline_values().items()]
        if status.tokens_per_second:
            parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{short_time(status.seconds_left)} left")
        return f"{status.method} {status.update}/{status.updates}: {', '.join(parts)}"

    def render(self) -> RenderableType:
        """Render the current live view."""
        status = self.status
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(
            f"update {status.update}/{status.updates}",
            ProgressBar(total=max(1, status.updates), completed=status.update),
            f"{short_time(status.seconds_left)} left",
        )
        phase = Text.assemble((status.phase, "bold"))
        if status.rollouts:
            phase.append(
                f"  {status.ended} of {status.rollouts} rollouts · {status.tokens_per_second:,.0f} tokens/s · "
                f"{status.exits} exits"
            )
        parts: list[RenderableType] = [head, phase]
        if values := status.headline_values():
            parts.append(Text("  ".join(f"{label} {short_number(value)}" for label, value in values.items())))
        if self._completion is not None:
            parts.append(Panel(self._completion, title="a completion of the last rollouts", border_style="dim"))
        return Panel(Group(*parts), title=status.method, title_align="left")


def coloured_steps(
    completion_ids: Sequence[int], injected: Sequence[bool], tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter
) -> Text:
    """Render the end of a completion, with each step in its own colour and injected tokens underlined."""
    row = torch.tensor([list(completion_ids)], dtype=torch.long)
    step_ids = segmenter.step_ids(row, torch.ones_like(row))[0].tolist()
    text = Text()
    for piece, step, was_injected in zip(
        token_texts(token_bytes(tokenizer), completion_ids), step_ids, injected, strict=True
    ):
        style = "dim" if step < 0 else _STEP_STYLES[step % len(_STEP_STYLES)]
        piece = visible(piece) if not text.plain.endswith("\n") else visible(piece).lstrip("\n")  # no empty lines
        text.append(re.sub("\n+", "\n", piece), style=f"{style} underline" if was_injected else style)
    return text if len(text) <= _LAST_CHARACTERS else Text("…").append_text(text[-_LAST_CHARACTERS:])
