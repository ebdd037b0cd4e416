from .best import (
    current_weights as current_weights,
    evaluations_without_better as evaluations_without_better,
    update_best as update_best,
    weights_to_publish as weights_to_publish,
)
from .distributed import (
    from_process_0 as from_process_0,
    has_other_processes as has_other_processes,
    initialize as initialize,
    lost_process_message as lost_process_message,
    processes_where as processes_where,
    refuse_different_processes as refuse_different_processes,
)
from .evaluation import (
    AnyEvaluation as AnyEvaluation,
    Evaluation as Evaluation,
    EvaluationStep as EvaluationStep,
    Normalize as Normalize,
    evaluate as evaluate,
    make_evaluation_step as make_evaluation_step,
)
from .features import (
    FeatureClassifier as FeatureClassifier,
    FeatureStep as FeatureStep,
    learns_from_features as learns_from_features,
    make_feature_step as make_feature_step,
    open_batches as open_batches,
)
from .optimizer import make_optimizer as make_optimizer, make_schedule as make_schedule
from .predictions import Predictions as Predictions
from .preemption import StopRequest as StopRequest
from .sharding import (
    BATCH_AXES as BATCH_AXES,
    batch_sharding as batch_sharding,
    check_batch as check_batch,
    devices_of_slices as devices_of_slices,
    make_mesh as make_mesh,
    process_part as process_part,
    replicated as replicated,
    state_shardings as state_shardings,
    to_devices as to_devices,
    to_host as to_host,
)
from .state import Classifier as Classifier, TrainState as TrainState, new_state as new_state
from .step import make_train_step as make_train_step
