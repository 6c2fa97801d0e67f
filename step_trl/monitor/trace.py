"""
Render a rollout as HTML: its text in steps, with triggers, probes, exit and the credit of each step.

The HTML is self-contained: it has no script, loads nothing from the network, and scopes all styles to one class, so
that several traces can share a page with each other and with anything else. It follows the reader's light or dark
colour scheme.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..rollout import ProbeRecord, Rollout
from ..steps import Segmenter, TriggerSegmenter, token_bytes
from ..text import token_texts, visible
from ..thoughts import skipped_thoughts


_STYLE = """<style>
.step-trl-trace { --back: #ffffff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --bar: #0969da; --chip: #ffffff;
  --trigger: #6639ba; --trigger-back: #f0e4ff; --injected: #0a5a85; --exit: #b3261e; --kept: #f6f8fa;
  --kept-line: #8c959f; --dropped: #fff1d6; --dropped-line: #bf6a02; --rewarded: #dcf5e3; --rewarded-line: #1a7f37;
  --right: #1a7f37; color-scheme: light dark; box-sizing: border-box; max-width: 62rem; padding: 1rem 1.25rem;
  border: 1px solid; border-color: var(--line); border-radius: 10px; background: var(--back); color: var(--text);
  font: 14px/1.6 system-ui, sans-serif; text-align: left }
@media (prefers-color-scheme: dark) { .step-trl-trace { --back: #0d1117; --text: #e6edf3; --dim: #9aa4af;
  --line: #30363d; --bar: #58a6ff; --chip: #0d1117; --trigger: #dcbdfb; --trigger-back: #3a2756; --injected: #79c0ff;
  --exit: #ff9a8f; --kept: #161b22; --kept-line: #6e7681; --dropped: #33250d; --dropped-line: #d29922;
  --rewarded: #10301c; --rewarded-line: #3fb950; --right: #3fb950 } }
.step-trl-trace .head { font-size: 16px; font-weight: 600 }
.step-trl-trace :is(.facts, .legend, .label) { color: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums }
.step-trl-trace .legend { margin: .4rem 0 .9rem }
.step-trl-trace .key { display: inline-block; margin-right: .6rem; padding: 0 .5rem }
.step-trl-trace :is(.step, .asked) { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: 1.25rem;
  margin: .5rem 0; padding: .6rem .9rem; border-radius: 4px }
.step-trl-trace .asked { padding: 0 .9rem }
.step-trl-trace .label b { color: var(--text); font-size: 13px }
.step-trl-trace .bar { height: 4px; margin: .2rem 0; border-radius: 2px;
  background: linear-gradient(90deg, var(--bar) var(--share), var(--line) 0) }
.step-trl-trace .body { font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate }
.step-trl-trace .edge { display: none }
.step-trl-trace .plain, .step-trl-trace :is(.step, .key, .mixed .text).kept { background: var(--kept) }
.step-trl-trace :is(.step, .key, .mixed .text).dropped { background: var(--dropped) }
.step-trl-trace :is(.step, .key, .mixed .text).rewarded { background: var(--rewarded) }
.step-trl-trace :is(.step, .key):is(.kept, .dropped, .rewarded) { border-left: 4px solid var(--edge);
  color: var(--text) }
.step-trl-trace .kept { --edge: var(--kept-line) }
.step-trl-trace .dropped { --edge: var(--dropped-line) }
.step-trl-trace .rewarded { --edge: var(--rewarded-line) }
.step-trl-trace .trigger { border-radius: 3px; background: var(--trigger-back); color: var(--trigger) }
.step-trl-trace .injected { color: var(--injected); text-decoration: underline dashed 1px; text-underline-offset: 3px }
.step-trl-trace :is(.exit, .probe) { display: inline-block; margin: 0 .15rem 0 .4rem; padding: 0 .5rem;
  border: 1px solid var(--line); border-radius: 9px; background: var(--chip); font: 12px/1.5 system-ui, sans-serif }
.step-trl-trace .exit { border-color: currentColor; color: var(--exit); font-weight: 600 }
.step-trl-trace .verdict { font-weight: 600 }
.step-trl-trace .right { color: var(--right) }
.step-trl-trace .wrong { color: var(--exit) }
.step-trl-trace .probe[open] { display: block; margin: .4rem 0; padding: .3rem .7rem }
.step-trl-trace .probe summary { cursor: pointer }
</style>"""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>:root {{ color-scheme: light dark }} .step-trl-trace {{ margin: 0 auto }}</style></head>
<body>{html}</body></html>
"""

_VERDICTS = {
    True: '<span class="verdict right">correct</span>',
    False: '<span class="verdict wrong">not correct</span>',
}


@dataclass(frozen=True)
class Trace:
    """
    The result of [`render_rollout`]. A notebook displays it; `wandb.Html(trace.html)` logs it.

    Attributes:
        html (`str`):
            The rollout as an HTML fragment. The completion's text is in the elements of class `text`.
        title (`str`):
            The title.
    """

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a complete HTML page to `path`."""
        page = _PAGE.format(title=_escaped(self.title or "Rollout"), html=self.html)
        Path(path).write_text(page, encoding="utf-8", errors="replace")


def render_rollout(
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    segmenter: Segmenter | None = None,
    advantage: float | torch.Tensor | None = None,
    selected_advantages: Sequence[float] | torch.Tensor | None = None,
    token_logps: Sequence[float] | torch.Tensor | None = None,
    problem: str | None = None,
    solution: str | None = None,
    correct: bool | None = None,
    title: str = "",
) -> Trace:
    """
    Render a completion: its steps with their confidence, its trigger words, probes, injected tokens and exit.

    Args:
        rollout ([`Rollout`]):
            The completion.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of its token ids.
        segmenter ([`TriggerSegmenter`] or [`DelimiterSegmenter`], *optional*):
            The segmenter that defines the steps, by default [`TriggerSegmenter`]. SAS's segmenter is
            `DelimiterSegmenter(tokenizer, end_text="</think>")`, with which the text after the thought is not a step.
        advantage (`float`, *optional*), selected_advantages (`Sequence[float]` of shape `(T,)`, *optional*):
            The completion's advantage, and the advantages of its tokens from [`select_step_advantages`]. Colours show
            which steps kept their advantage, which dropped to 0, and which were rewarded. Pass both or neither.
        token_logps (`Sequence[float]` of shape `(T,)`, *optional*):
            The log-probabilities for the confidences, by default those of the rollout. NaN is ignored.
        problem (`str`, *optional*), solution (`str`, *optional*), correct (`bool`, *optional*):
            The problem and the correct answer, shown above the completion, and whether its answer is correct.
        title (`str`, *optional*):
            The heading.

    Returns:
        [`Trace`]: The rendered rollout.

    Example:

    ```python
    >>> trace = render_rollout(rollout, tokenizer, problem="2 + 3 =", solution="5", correct=True)
    >>> trace.save("trace.html")
    ```
    """
    logps = _per_token("token_logps", rollout.logprobs if token_logps is None else token_logps, rollout)
    credits = _credits(advantage, selected_advantages, rollout)
    segmenter = TriggerSegmenter(tokenizer) if segmenter is None else segmenter
    words = segmenter if isinstance(segmenter, TriggerSegmenter) else TriggerSegmenter(tokenizer)
    in_trigger = {i for span in words.occurrences(rollout.completion_ids) for i in range(*span)}
    pieces = token_bytes(tokenizer)
    notes = _notes(rollout, pieces)
    tokens = []
    for i, text in enumerate(token_texts(pieces, rollout.completion_ids)):
        marks = ["text", *["trigger"] * (i in in_trigger), *["injected"] * rollout.injected[i], credits[i][0]]
        tokens.append(_Token(text, logps[i], " ".join(marks).rstrip(), credits[i], "".join(notes[i + 1])))
    row = torch.tensor([rollout.completion_ids], dtype=torch.long)
    step_ids = segmenter.step_ids(row, torch.ones_like(row))[0].tolist()
    steps = [(i, [token for _, token in run]) for i, run in groupby(zip(step_ids, tokens), key=lambda pair: pair[0])]
    facts = [
        *([] if correct is None else [_VERDICTS[bool(correct)]]),
        f"tokens: {len(tokens)}, injected: {sum(rollout.injected)}",
        f"steps: {sum(i >= 0 for i, _ in steps)}",
        f"probes: {len(rollout.probes)}",
        "truncated" if rollout.truncated else "not truncated",
        *["thought skipped"] * skipped_thoughts(["".join(token.text for token in tokens)])[0],
        *([] if advantage is None else [f"advantage: {float(advantage):.3g}"]),
    ]
    parts = [_STYLE, '<div class="step-trl-trace">', f'<div class="head">{_escaped(title)}</div>' if title else ""]
    parts += [f'<div class="facts">{" · ".join(facts)}</div>', *_asked(problem, solution), _legend(tokens), *notes[0]]
    parts += [_step(i, run) for i, run in steps]
    return Trace("\n".join([*parts, "</div>"]), title)


@dataclass(frozen=True)
class _Token:
    """A token. `marks` are CSS classes, `credit` is a label and the advantage, `after` is HTML after the token."""

    text: str
    logp: float
    marks: str
    credit: tuple[str, float]
    after: str


def _escaped(text: str) -> str:
    return escape(visible(text))


def _asked(problem: str | None, solution: str | None) -> list[str]:
    return [
        f'<div class="asked"><div class="label"><b>{label}</b></div><div class="body {label.lower()}">'
        f"{_escaped(text)}</div></div>"
        for label, text in (("Problem", problem), ("Solution", solution))
        if text is not None
    ]


def _per_token(name: str, values: Iterable[float], rollout: Rollout) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != len(rollout.completion_ids):
        raise ValueError(
            f"{name}: {len(numbers)} values for {len(rollout.completion_ids)} tokens. Pass one for each token of the "
            "completion, without padding."
        )
    return numbers


def _credits(
    advantage: float | torch.Tensor | None, selected: Iterable[float] | None, rollout: Rollout
) -> list[tuple[str, float]]:
    if advantage is None and selected is None:
        return [("", math.nan)] * len(rollout.completion_ids)
    if advantage is None or selected is None:
        raise ValueError("advantage, selected_advantages: only one of them is given. Pass both or neither.")
    own = float(advantage)
    # A Python number and its float32 value in a tensor are the same advantage.
    return [
        ("kept" if math.isclose(value, own, rel_tol=1e-6) else "dropped" if value == 0 else "rewarded", value)
        for value in _per_token("selected_advantages", selected, rollout)
    ]


def _notes(rollout: Rollout, pieces: Sequence[bytes]) -> defaultdict[int, list[str]]:
    """Return the HTML of the probes and of the exit, by their positions in the text."""
    end = len(rollout.completion_ids)
    if rollout.truncated:
        exits = [probe.position for probe in rollout.probes if probe.outcome == "exit"]
        end = rollout.injected.index(True) if True in rollout.injected else min([*exits, end])
    notes: defaultdict[int, list[str]] = defaultdict(list)
    for number, probe in enumerate(rollout.probes, 1):
        # After an exit without its trigger, the position of the probe is after the end of the thought.
        notes[min(probe.position, end)].append(_probe(number, probe, pieces))
    if rollout.truncated:
        notes[end].append('<span class="exit">exit</span>')
    return notes


def _probe(number: int, probe: ProbeRecord, pieces: Sequence[bytes]) -> str:
    confidence = "" if probe.confidence is None else f" · {probe.confidence:.3f}"
    answer = _escaped("".join(token_texts(pieces, probe.token_ids)))
    return (
        f'<details class="probe"><summary>probe {number} · {_escaped(probe.outcome)}{confidence}</summary>'
        f'<code class="body answer">{answer}</code>'
        f'<div class="label">tokens: {len(probe.token_ids)}, asked after token {probe.position}</div></details>'
    )


def _legend(tokens: Sequence[_Token]) -> str:
    marks = "".join(token.marks for token in tokens)
    keys = [mark for mark in ("trigger", "injected") if mark in marks]
    if any(token.credit[0] for token in tokens):
        keys += ["kept", "dropped", "rewarded"]
    return '<div class="legend">' + "".join(f'<span class="key {key}">{key}</span>' for key in keys) + "</div>"


def _step(step_id: int, tokens: Sequence[_Token]) -> str:
    credit, value = tokens[0].credit
    if any(token.credit[0] != credit for token in tokens):
        credit = "mixed"
    logps = [token.logp for token in tokens if not math.isnan(token.logp)]
    label = f"<b>{f'Step {step_id + 1}' if step_id >= 0 else 'After the thought'}</b>"
    label += f" {credit}" if credit in ("", "mixed") else f" {credit}: {value:.3g}"
    label += f"<br>tokens: {len(tokens)}"
    if logps:
        confidence = math.exp(math.fsum(logps) / len(logps))
        label += f' · conf. {confidence:.3f}<div class="bar" style="--share: {100 * confidence:.0f}%"></div>'
    body = "".join(
        f'<span class="{marks}">{_escaped("".join(token.text for token in run))}</span>{after}'
        for (marks, after), run in groupby(tokens, key=lambda token: (token.marks, token.after))
    )
    # Steps are displayed with gaps anyway, so line breaks at their ends are hidden.
    body = re.sub(r"(^<span [^>]*>)?(?<!\n)(\n+)((?(1)|</span>$))", r'\1<span class="edge">\2</span>\3', body)
    return (
        f'<div class="step {credit or "plain"}"><div class="label">{label}</div><div class="body">{body}</div></div>'
    )
