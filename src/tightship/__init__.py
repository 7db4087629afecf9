"""One checkpoint in; small, runnable, proven artifacts out."""

__version__ = "0.1.0"
