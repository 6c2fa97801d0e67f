"""Reads Markdown tables."""

import re


def unpadded(text: str) -> str:
    """Remove the padding of the cells and of the lines below the heads."""
    return re.sub(r"-{3,}", "---", re.sub(" {2,}", " ", text))
