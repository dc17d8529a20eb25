"""Self-play alignment of language models: α-SPIN and its relatives on one frozen base."""

__version__ = "0.1.0"
