from .block import fold_star_relu as fold_star_relu, kernel_stages as kernel_stages
from .config import MetaFormerConfig as MetaFormerConfig, PoolFormerConfig as PoolFormerConfig
from .config_fields import HIDDEN_ACTS as HIDDEN_ACTS, ProblemType as ProblemType
from .functional import (
    ACTIVATIONS as ACTIVATIONS,
    DOWNSAMPLE_EPSILON as DOWNSAMPLE_EPSILON,
    POOLED_EPSILON as POOLED_EPSILON,
    attention as attention,
    cross_entropy as cross_entropy,
    dense as dense,
    depthwise_convolution as depthwise_convolution,
    distance_and_inverse_std as distance_and_inverse_std,
    gelu as gelu,
    group_norm as group_norm,
    mix_positions as mix_positions,
    over_channels as over_channels,
    pooling_mixer as pooling_mixer,
    standardize as standardize,
    star_relu as star_relu,
    widen as widen,
)
from .heads import classify_features as classify_features
from .inputs import Pixels as Pixels, check_dtype as check_dtype, check_pixel_values as check_pixel_values
from .layers import initial_value as initial_value
from .loss import (
    check_has_probabilities as check_has_probabilities,
    mean_loss as mean_loss,
    probabilities as probabilities,
    resolved_problem_type as resolved_problem_type,
)
from .mismatch import WeightsMismatch as WeightsMismatch, check_names_and_shapes as check_names_and_shapes
from .model import (
    ImageClassifierOutput as ImageClassifierOutput,
    MetaFormerForImageClassification as MetaFormerForImageClassification,
    MetaFormerModel as MetaFormerModel,
    MetaFormerModelOutput as MetaFormerModelOutput,
    PoolFormerForImageClassification as PoolFormerForImageClassification,
    PoolFormerModel as PoolFormerModel,
    PoolFormerModelOutput as PoolFormerModelOutput,
)
from .parameter_table import (
    CONSTANTS as CONSTANTS,
    HEAD_DIM as HEAD_DIM,
    MIXER_PARAMETERS as MIXER_PARAMETERS,
    NETWORK as NETWORK,
    PARAMS as PARAMS,
    ParameterRow as ParameterRow,
    backbone_rows as backbone_rows,
    columns as columns,
    head_rows as head_rows,
)
from .parameters import (
    Parameter as Parameter,
    all_parameters as all_parameters,
    check_variables as check_variables,
    count_parameters as count_parameters,
    leaves_by_path as leaves_by_path,
    merge_collections as merge_collections,
    parameters_of_rows as parameters_of_rows,
    subtree as subtree,
    variables_of as variables_of,
)
from .published import describe_network as describe_network, published_variant as published_variant
from .token_mixers import TOKEN_MIXERS as TOKEN_MIXERS
from .variants import (
    BASELINES as BASELINES,
    FAMILIES as FAMILIES,
    SIZES as SIZES,
    VARIANTS as VARIANTS,
)
