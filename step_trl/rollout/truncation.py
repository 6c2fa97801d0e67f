"""
Interface between truncation callbacks and rollouts.

A callback names boundaries of a thought. At each [`Boundary`] it returns a decision: [`GoOn`] continues, [`Exit`] ends
the thought, and [`Probe`] induces an answer on which the callback then decides. Callbacks work on token ids and text
and know neither engines nor trainers. The callbacks of the package are in `callbacks.py`.
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
    One probe, at a path of length `position`.

    `confidence` is `None` for abandoned probes and for callbacks that measure none.
    """

    position: int
    token_ids: list[int]
    logprobs: list[float]
    outcome: Outcome
    confidence: float | None


@dataclass(frozen=True)
class Boundary:
    """
    A position at which a rollout may exit.

    Attributes:
        prompt_ids (`Sequence[int]`), path_ids (`Sequence[int]`):
            Prompt of the rollout, and its completion so far, including the trigger.
        trigger_start (`int`):
            Index in `path_ids` of the first token of the trigger, or the length of the path at a boundary without a
            trigger.
        remaining (`int`):
            Remaining tokens of the completion's budget.
        number (`int`), probes (`Sequence[ProbeRecord]`):
            Number of earlier boundaries, and the earlier probes, of this callback in this rollout.
    """

    prompt_ids: Sequence[int]
    path_ids: Sequence[int]
    trigger_start: int
    remaining: int
    number: int
    probes: Sequence[ProbeRecord]


@dataclass(frozen=True)
class GoOn:
    """Continue the thought. With `watch=False`, this callback is not called again in this rollout."""

    watch: bool = True


@dataclass(frozen=True)
class Exit:
    """
    End the thought.

    Attributes:
        keep_trigger (`bool`):
            Whether the trigger stays in the path.
        closing_ids (`list[int]`):
            Tokens that are injected to close the thought before the final answer is sampled. Unused if the kept answer
            of a probe has closed it.
        keep_answer (`bool`):
            Whether the prompt and the answer of the probe become the answer of the completion.
    """

    keep_trigger: bool
    closing_ids: list[int]
    keep_answer: bool = False


@dataclass(frozen=True)
class Probe:
    """
    Induce a tentative answer by greedy decoding.

    Attributes:
        prompt_ids (`list[int]`):
            Tokens that are injected after the path.
        max_tokens (`int`):
            Maximum number of answer tokens.
        keep_trigger (`bool`):
            Whether the trigger is part of the probe's context.
        stop (`tuple[str, ...]`):
            Stop strings of the answer, besides EOS.
        closes_thought (`bool`):
            Whether the prompt closes the thought, so that the answer is the last part of the completion.
        abandon (`AbandonRule`, *optional*):
            Rule that ends the probe once it can no longer lead to an exit.
        confidence (`Callable[[Generation], float]`, *optional*):
            Confidence of an answer in 0..1, for the record of the probe.
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
    Decides where thoughts end. A custom callback names boundaries and returns a decision at each of them:

    ```python
    class StopAtThirdDoubt(TruncationCallback):
        triggers = ("Wait",)

        def __init__(self, tokenizer):
            self.closing_ids = tokenizer.encode("\\n</think>\\n\\n", add_special_tokens=False)

        def at_boundary(self, boundary):
            return Exit(keep_trigger=False, closing_ids=self.closing_ids) if boundary.number == 2 else GoOn()
    ```

    One callback serves all rollouts concurrently. The state of a rollout is in the [`Boundary`].

    Attributes:
        triggers (`Sequence[str]`):
            Trigger words. Each occurrence is a boundary. None by default.
    """

    triggers: Sequence[str] = ()

    def positions(self, prompt_ids: Sequence[int], max_tokens: int, seed: int | None) -> Iterable[int]:
        """
        Return further boundaries as lengths of the path, in ascending order. None by default.

        `max_tokens` is the budget of the completion, and `seed` that of the rollout.
        """
        return ()

    def at_boundary(self, boundary: Boundary) -> Decision:
        """Decide at a boundary of an open thought."""
        raise NotImplementedError

    def after_probe(self, boundary: Boundary, probe: Probe, answer: Generation) -> Exit | None:
        """Decide on the answer of a probe that `at_boundary` returned. `None` continues the thought."""
        raise NotImplementedError
