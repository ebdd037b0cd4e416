"""data/augment."""
