"""Following a training: its state, views of it, and what trackers show."""

from .status import RunStatus
from .terminal import TerminalView
from .trackers import TrackerCallback


__all__ = ["RunStatus", "TerminalView", "TrackerCallback"]
