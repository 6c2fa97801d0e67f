"""What is owned by every trainer is tested on real ones."""

from trainers.conftest import build, easy_problems, mixed_problems, tokenizer


__all__ = ["build", "easy_problems", "mixed_problems", "tokenizer"]
