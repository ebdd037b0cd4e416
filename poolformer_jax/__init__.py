"""PoolFormer in JAX / Flax: the public names, and nothing else."""

__version__ = "0.1.0.dev0"
