"""Engines: the sources of tokens."""

from .base import AbandonRule, Engine, Generation, PromptImages
from .scheduler import EngineStats
from .transformers import TransformersEngine
from .vllm_colocated import VLLMColocatedEngine
from .vllm_http import EngineError, EngineUnavailableError
from .vllm_process import VLLMServer
from .vllm_server import VLLMServerEngine


__all__ = [
    "AbandonRule",
    "Engine",
    "EngineError",
    "EngineStats",
    "EngineUnavailableError",
    "Generation",
    "PromptImages",
    "TransformersEngine",
    "VLLMColocatedEngine",
    "VLLMServer",
    "VLLMServerEngine",
]
