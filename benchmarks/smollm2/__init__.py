"""A model a hundred times larger than the testbed's, with real pre-training: SmolLM2-135M-Instruct."""
