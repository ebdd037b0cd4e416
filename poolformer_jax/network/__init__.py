"""The network: config, published variants, parameters, and linen modules.

Other packages use the names below. Each is imported when it is first used, because the config, the variants and the
parameter table do not need jax.
"""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from poolformer_jax.network.block import kernel_stages as kernel_stages
    from poolformer_jax.network.config import HIDDEN_ACTS as HIDDEN_ACTS
    from poolformer_jax.network.config import PoolFormerConfig as PoolFormerConfig
    from poolformer_jax.network.config import names_by_index as names_by_index
    from poolformer_jax.network.config import published_variant as published_variant
    from poolformer_jax.network.functional import ACTIVATIONS as ACTIVATIONS
    from poolformer_jax.network.functional import EPSILON as EPSILON
    from poolformer_jax.network.functional import POOLED_EPSILON as POOLED_EPSILON
    from poolformer_jax.network.functional import attention as attention
    from poolformer_jax.network.functional import cross_entropy as cross_entropy
    from poolformer_jax.network.functional import dense as dense
    from poolformer_jax.network.functional import distance_and_inverse_std as distance_and_inverse_std
    from poolformer_jax.network.functional import gelu as gelu
    from poolformer_jax.network.functional import mix_positions as mix_positions
    from poolformer_jax.network.functional import over_channels as over_channels
    from poolformer_jax.network.functional import pooling_mixer as pooling_mixer
    from poolformer_jax.network.functional import standardize as standardize
    from poolformer_jax.network.functional import widen as widen
    from poolformer_jax.network.heads import probabilities as probabilities
    from poolformer_jax.network.inputs import Pixels as Pixels
    from poolformer_jax.network.inputs import check_dtype as check_dtype
    from poolformer_jax.network.inputs import check_pixel_values as check_pixel_values
    from poolformer_jax.network.layers import initial_value as initial_value
    from poolformer_jax.network.mismatch import WeightsMismatch as WeightsMismatch
    from poolformer_jax.network.mismatch import check_names_and_shapes as check_names_and_shapes
    from poolformer_jax.network.model import ImageClassifierOutput as ImageClassifierOutput
    from poolformer_jax.network.model import PoolFormerForImageClassification as PoolFormerForImageClassification
    from poolformer_jax.network.model import PoolFormerModel as PoolFormerModel
    from poolformer_jax.network.model import PoolFormerModelOutput as PoolFormerModelOutput
    from poolformer_jax.network.parameter_table import MIXER_PARAMETERS as MIXER_PARAMETERS
    from poolformer_jax.network.parameter_table import NETWORK as NETWORK
    from poolformer_jax.network.parameter_table import ParameterRow as ParameterRow
    from poolformer_jax.network.parameter_table import backbone_rows as backbone_rows
    from poolformer_jax.network.parameter_table import columns as columns
    from poolformer_jax.network.parameter_table import head_rows as head_rows
    from poolformer_jax.network.parameters import Parameter as Parameter
    from poolformer_jax.network.parameters import all_parameters as all_parameters
    from poolformer_jax.network.parameters import check_variables as check_variables
    from poolformer_jax.network.parameters import count_parameters as count_parameters
    from poolformer_jax.network.parameters import leaves_by_path as leaves_by_path
    from poolformer_jax.network.parameters import parameters_of_rows as parameters_of_rows
    from poolformer_jax.network.parameters import subtree as subtree
    from poolformer_jax.network.token_mixers import HEAD_DIM as HEAD_DIM
    from poolformer_jax.network.token_mixers import TOKEN_MIXERS as TOKEN_MIXERS
    from poolformer_jax.network.variants import SIZES as SIZES
    from poolformer_jax.network.variants import SOURCE as SOURCE
    from poolformer_jax.network.variants import VARIANTS as VARIANTS

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "block": "kernel_stages",
        "config": "HIDDEN_ACTS PoolFormerConfig names_by_index published_variant",
        "functional": "ACTIVATIONS EPSILON POOLED_EPSILON attention cross_entropy dense distance_and_inverse_std gelu "
        "mix_positions over_channels pooling_mixer standardize widen",
        "heads": "probabilities",
        "inputs": "Pixels check_dtype check_pixel_values",
        "layers": "initial_value",
        "mismatch": "WeightsMismatch check_names_and_shapes",
        "model": "ImageClassifierOutput PoolFormerForImageClassification PoolFormerModel PoolFormerModelOutput",
        "parameter_table": "MIXER_PARAMETERS NETWORK ParameterRow backbone_rows columns head_rows",
        "parameters": "Parameter all_parameters check_variables count_parameters leaves_by_path parameters_of_rows "
        "subtree",
        "token_mixers": "HEAD_DIM TOKEN_MIXERS",
        "variants": "SIZES SOURCE VARIANTS",
    },
)
