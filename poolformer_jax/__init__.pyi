from .errors import InputError as InputError, PoolFormerError as PoolFormerError
from .export import export_model as export_model
from .images import (
    ImageError as ImageError,
    PoolFormerFeatureExtractor as PoolFormerFeatureExtractor,
    PoolFormerImageProcessor as PoolFormerImageProcessor,
)
from .inference import (
    ExportError as ExportError,
    GradCam as GradCam,
    HeightShardedModel as HeightShardedModel,
    ImageClassifier as ImageClassifier,
    ImageEmbedder as ImageEmbedder,
    Prediction as Prediction,
    pipeline as pipeline,
)
from .network import (
    ImageClassifierOutput as ImageClassifierOutput,
    MetaFormerConfig as MetaFormerConfig,
    MetaFormerForImageClassification as MetaFormerForImageClassification,
    MetaFormerModel as MetaFormerModel,
    MetaFormerModelOutput as MetaFormerModelOutput,
    PoolFormerConfig as PoolFormerConfig,
    PoolFormerForImageClassification as PoolFormerForImageClassification,
    PoolFormerModel as PoolFormerModel,
    PoolFormerModelOutput as PoolFormerModelOutput,
    WeightsMismatch as WeightsMismatch,
)
from .network.fused import GpuKernels as GpuKernels, TpuKernels as TpuKernels
from .weights import (
    FlaxPoolFormerForImageClassification as FlaxPoolFormerForImageClassification,
    FlaxPoolFormerModel as FlaxPoolFormerModel,
    WeightsFileError as WeightsFileError,
    from_torch_state_dict as from_torch_state_dict,
    load_pretrained as load_pretrained,
    save_pretrained as save_pretrained,
    to_torch_state_dict as to_torch_state_dict,
)

__version__: str
