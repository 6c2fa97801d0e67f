"""The runtime is tested on real trainers."""

from trainers.conftest import build, easy_problems, remembered_generate, tokenizer


__all__ = ["build", "easy_problems", "remembered_generate", "tokenizer"]
