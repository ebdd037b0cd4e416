from .image_lists import is_one_image as is_one_image
from .imagenet import imagenet_labels as imagenet_labels, imagenet_wordnet_ids as imagenet_wordnet_ids
from .orientation import is_upright as is_upright
from .processor import (
    PoolFormerFeatureExtractor as PoolFormerFeatureExtractor,
    PoolFormerImageProcessor as PoolFormerImageProcessor,
    share_of_edge as share_of_edge,
)
from .processor_config import PREPROCESSOR_CONFIG as PREPROCESSOR_CONFIG
from .processor_fields import LARGEST_SIDE as LARGEST_SIDE
from .reading import (
    HEIF_SUFFIXES as HEIF_SUFFIXES,
    ImageError as ImageError,
    ImageLike as ImageLike,
    image_suffixes as image_suffixes,
    open_image as open_image,
    raising_image_errors as raising_image_errors,
    read_image as read_image,
    read_image_file as read_image_file,
)
