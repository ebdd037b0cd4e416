"""data/workers."""
