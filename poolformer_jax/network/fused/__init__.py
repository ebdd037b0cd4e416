"""network/fused."""
