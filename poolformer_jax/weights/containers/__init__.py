"""weights/containers."""
