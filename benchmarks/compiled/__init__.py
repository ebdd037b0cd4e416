"""Compiles the network for GPUs and TPUs that are not present, and reads what the compilers wrote."""
