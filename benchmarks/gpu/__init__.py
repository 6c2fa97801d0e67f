"""Measurements on a GPU, in blocks that are started one by one. `block.py` has what they share."""
