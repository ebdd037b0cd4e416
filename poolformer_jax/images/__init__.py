"""Pictures to pixels: reading images, the preprocessing and its config files, ImageNet's labels. Imports no jax."""

from typing import TYPE_CHECKING

from poolformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from poolformer_jax.images.imagenet import imagenet_labels as imagenet_labels
    from poolformer_jax.images.imagenet import imagenet_wordnet_ids as imagenet_wordnet_ids
    from poolformer_jax.images.orientation import is_upright as is_upright
    from poolformer_jax.images.processor import PoolFormerFeatureExtractor as PoolFormerFeatureExtractor
    from poolformer_jax.images.processor import PoolFormerImageProcessor as PoolFormerImageProcessor
    from poolformer_jax.images.processor import is_one_image as is_one_image
    from poolformer_jax.images.processor import share_of_edge as share_of_edge
    from poolformer_jax.images.processor import unit_mean_and_std as unit_mean_and_std
    from poolformer_jax.images.processor_config import PREPROCESSOR_CONFIG as PREPROCESSOR_CONFIG
    from poolformer_jax.images.reading import HEIF_SUFFIXES as HEIF_SUFFIXES
    from poolformer_jax.images.reading import ImageError as ImageError
    from poolformer_jax.images.reading import ImageLike as ImageLike
    from poolformer_jax.images.reading import image_suffixes as image_suffixes
    from poolformer_jax.images.reading import printable as printable
    from poolformer_jax.images.reading import raising_image_errors as raising_image_errors
    from poolformer_jax.images.reading import read_image as read_image

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "imagenet": "imagenet_labels imagenet_wordnet_ids",
        "orientation": "is_upright",
        "processor": "PoolFormerFeatureExtractor PoolFormerImageProcessor is_one_image share_of_edge unit_mean_and_std",
        "processor_config": "PREPROCESSOR_CONFIG",
        "reading": "HEIF_SUFFIXES ImageError ImageLike image_suffixes printable raising_image_errors read_image",
    },
)
