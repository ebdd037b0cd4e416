"""Everything that knows a PyTorch name: the tables, the files, and the transfer between a state dict and a tree."""

from poolformer_jax.network import WeightsMismatch
from poolformer_jax.weights.transfer import from_torch_state_dict, to_torch_state_dict

__all__ = ["WeightsMismatch", "from_torch_state_dict", "to_torch_state_dict"]
