"""Weights files: safetensors, and the zip and legacy files of `torch.save` with their pickles."""
