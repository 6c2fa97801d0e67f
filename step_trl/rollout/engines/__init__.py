"""Engines: where tokens come from."""

from .base import AbandonRule, Engine, Generation
from .transformers import EngineStats, TransformersEngine


__all__ = ["AbandonRule", "Engine", "EngineStats", "Generation", "TransformersEngine"]
