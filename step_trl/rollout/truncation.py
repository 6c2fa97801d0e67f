"""
The words in which a truncation callback and the rollout talk: at a boundary of a running rollout, go on, stop, or ask
the model first.

A callback names the boundaries that it wants to see, sees a [`Boundary`] at each and returns a decision: [`GoOn`],
[`Exit`], or [`Probe`], whose answer it is shown before it decides. It knows token ids and text, no engine and no
trainer. The callbacks of the package are in `callbacks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .engines import AbandonRule, Generation


Outcome = Literal["exit", "declined", "abandoned"]


@dataclass(frozen=True)
class ProbeRecord:
    """
    One probe: `position` is the length of the path at its boundary; `confidence` is the callback's measure, `None` for
    an abandoned probe and for a callback that does not measure.
    """

    position: int
    token_ids: list[int]
    logprobs: list[float]
    outcome: Outcome
    confidence: float | None


@dataclass(frozen=True)
class Boundary:
    """
    A place where a rollout may stop.

    Attributes:
        prompt_ids (`Sequence[int]`):
            Prompt of the rollout.
        path_ids (`Sequence[int]`):
            Completion so far, the trigger included.
        trigger_start (`int`):
            Index in `path_ids` of the first token of the trigger; at a position that the callback named, which has no
            trigger, the length of the path.
        remaining (`int`):
            Tokens left of the completion's budget.
        number (`int`):
            Boundaries of this rollout that this callback was shown before.
        probes (`Sequence[ProbeRecord]`):
            Probes that this callback has made in this rollout.
    """

    prompt_ids: Sequence[int]
    path_ids: Sequence[int]
    trigger_start: int
    remaining: int
    number: int
    probes: Sequence[ProbeRecord]


@dataclass(frozen=True)
class GoOn:
    """The thought goes on; with `watch=False` to its end, this callback is not asked again."""

    watch: bool = True


@dataclass(frozen=True)
class Exit:
    """
    The thought ends here.

    Attributes:
        keep_trigger (`bool`):
            Whether the trigger stays in the path.
        closing_ids (`list[int]`):
            Injected after the path to close the thought, before the final answer is sampled. Unused where the kept
            answer of a probe has closed it.
        keep_answer (`bool`):
            Whether the probe's prompt and answer become the completion's answer.
    """

    keep_trigger: bool
    closing_ids: list[int]
    keep_answer: bool = False


@dataclass(frozen=True)
class Probe:
    """
    A tentative answer to induce, by greedy decoding.

    Attributes:
        prompt_ids (`list[int]`):
            Injected after the path.
        max_tokens (`int`):
            Most answer tokens.
        keep_trigger (`bool`):
            Whether the trigger is part of the probe's context.
        stop (`tuple[str, ...]`):
            Strings that end the answer, besides EOS.
        closes_thought (`bool`):
            Whether the prompt closes the thought: the answer is then the completion's last part.
        abandon (`AbandonRule`, *optional*):
            Ends the probe as soon as it can no longer lead to an exit.
        confidence (`Callable[[Generation], float]`, *optional*):
            How sure of the answer the model is, in 0..1, for the record of the probe.
    """

    prompt_ids: list[int]
    max_tokens: int
    keep_trigger: bool
    stop: tuple[str, ...] = ()
    closes_thought: bool = True
    abandon: AbandonRule | None = None
    confidence: Callable[[Generation], float] | None = None


Decision = GoOn | Exit | Probe


class TruncationCallback:
    """
    Decides where thoughts end. A callback of your own names boundaries and says what to do there:

    ```python
    class StopAtThirdDoubt(TruncationCallback):
        triggers = ("Wait",)

        def __init__(self, tokenizer):
            self.closing_ids = tokenizer.encode("\\n</think>\\n\\n", add_special_tokens=False)

        def at_boundary(self, boundary):
            return Exit(keep_trigger=False, closing_ids=self.closing_ids) if boundary.number == 2 else GoOn()
    ```

    One object serves all rollouts at once: what it remembers of a rollout is in the [`Boundary`].

    Attributes:
        triggers (`Sequence[str]`):
            Words at whose end it wants to be asked. None by default.
    """

    triggers: Sequence[str] = ()

    def positions(self, prompt_ids: Sequence[int], max_tokens: int, seed: int | None) -> Iterable[int]:
        """
        Lengths of the path, in ascending order, at which it wants to be asked besides. None by default.

        Args:
            prompt_ids (`Sequence[int]`):
                Prompt of the rollout.
            max_tokens (`int`):
                Budget of the completion.
            seed (`int`, *optional*):
                Of this rollout.
        """
        return ()

    def at_boundary(self, boundary: Boundary) -> Decision:
        """Called at each boundary of an open thought."""
        raise NotImplementedError

    def after_probe(self, boundary: Boundary, probe: Probe, answer: Generation) -> Exit | None:
        """Called with the answer of a probe that `at_boundary` asked for; `None` lets the thought go on."""
        raise NotImplementedError
