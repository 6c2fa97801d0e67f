"""An OpenAI-compatible endpoint whose completions end their thoughts early, before a vLLM server."""

from .app import EarlyExitEndpoint
from .exits import ExitOptions
from .serving import sampling_defaults, serve_endpoint


__all__ = ["EarlyExitEndpoint", "ExitOptions", "sampling_defaults", "serve_endpoint"]
