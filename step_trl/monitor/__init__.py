"""Follow a training: its status, live views of it, and what trackers show."""

from .monitor import Monitor
from .status import RunStatus
from .terminal import TerminalView
from .trackers import TrackerCallback


__all__ = ["Monitor", "RunStatus", "TerminalView", "TrackerCallback"]
