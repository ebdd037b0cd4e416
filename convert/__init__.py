"""`python -m convert`: weights of PoolFormer from any home to any other, and an account of what was done."""
