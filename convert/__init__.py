"""`python -m convert`: converts PoolFormer weights between the layouts of JAX and PyTorch, with a report."""
