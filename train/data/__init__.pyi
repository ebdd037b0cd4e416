from .augment.device import (
    augment_batch as augment_batch,
    make_targets as make_targets,
    normalize_batch as normalize_batch,
)
from .augment.jpeg_region import decodes_regions as decodes_regions
from .augment.resizing import choose_resizer as choose_resizer
from .augment.transforms import TrainingTransform as TrainingTransform
from .balance import balanced_weights as balanced_weights, class_counts as class_counts
from .batches import (
    Batches as Batches,
    batch_bytes as batch_bytes,
    max_shared_batches as max_shared_batches,
    worker_count as worker_count,
)
from .config import (
    DIGITS as DIGITS,
    DataConfig as DataConfig,
    DeviceAugmentation as DeviceAugmentation,
    HostAugmentation as HostAugmentation,
    rules_of_columns as rules_of_columns,
)
from .labels import check_same_classes as check_same_classes, match_labels as match_labels
from .pipeline import (
    evaluation_batches as evaluation_batches,
    evaluation_steps as evaluation_steps,
    train_batches as train_batches,
    train_places as train_places,
)
from .prepare import prepare_data as prepare_data
from .prepare_config import PrepareConfig as PrepareConfig
from .sources.folders import (
    ALL_IMAGES as ALL_IMAGES,
    FolderSource as FolderSource,
    describe_skipped as describe_skipped,
)
from .sources.opening import (
    describe_split as describe_split,
    describe_unused_test as describe_unused_test,
    find_splits as find_splits,
    open_source as open_source,
)
from .sources.source import (
    ArraySource as ArraySource,
    Example as Example,
    Source as Source,
    SourceError as SourceError,
    image_of as image_of,
    read_example as read_example,
)
from .timm_images import TimmImageProcessor as TimmImageProcessor
from .workers.failures import SHARED_MEMORY_ADVICE as SHARED_MEMORY_ADVICE, WorkerError as WorkerError
