"""Grain's worker processes: how they start, and the error for one that fails."""
