"""`pipeline`: image classification with the arguments and answers of `transformers.pipeline`.

Source of the defaults: transformers 5, pipelines/image_classification.py, `ImageClassificationPipeline.postprocess`.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Float32

from poolformer_jax.errors import InputError
from poolformer_jax.images import ImageError, ImageLike, PoolFormerImageProcessor, is_one_image
from poolformer_jax.inference.from_pretrained import not_picklable
from poolformer_jax.inference.program import fastest_network
from poolformer_jax.inference.streaming import ImageStream, check_at_least_one, open_stream
from poolformer_jax.network import PoolFormerConfig, describe_network
from poolformer_jax.network.fused import KernelMode
from poolformer_jax.weights import (
    FlaxPoolFormerForImageClassification,
    build_model,
    class_names,
    default_image_processor,
    open_model,
)

Scores: TypeAlias = list[dict[str, Any]]
FunctionToApply: TypeAlias = Literal["softmax", "sigmoid", "none"]
_TASK = "image-classification"


class ImageClassificationPipeline:
    """What `pipeline("image-classification", ...)` returns.

    Attributes:
        config: the network.
        image_processor: the preprocessing.
    """

    def __init__(
        self,
        config: PoolFormerConfig,
        image_processor: PoolFormerImageProcessor,
        id2label: dict[int, str],
        logits: ImageStream,
        *,
        top_k: int | None,
        function_to_apply: FunctionToApply | None,
    ) -> None:
        self.config = config
        self.image_processor = image_processor
        self._labels = id2label
        self._images = logits
        self._defaults = {"top_k": top_k, "function_to_apply": function_to_apply}

    __reduce__ = not_picklable

    def __repr__(self) -> str:
        return f"ImageClassificationPipeline({describe_network(self.config)})"

    def __call__(self, images: ImageLike, **options: Any) -> Scores | list[Scores] | Iterator[Scores]:
        """The labels of one image or of several, with their scores.

        Args:
            images: one or several that `PoolFormerImageProcessor.read` takes.
            options: top_k and function_to_apply, instead of those given to `pipeline`.

        Returns:
            `[{"label": ..., "score": ...}, ...]` for one image, highest score first; a list of these for a list, a
            tuple or an array; an iterator over them for any other iterable, which may be endless.

        Raises:
            ImageError: if an image cannot be read. `ImageClassifier` returns the error in its place instead.
        """
        if unknown := sorted(options.keys() - self._defaults.keys()):
            raise InputError(f"There is no option {', '.join(unknown)}. Expected top_k or function_to_apply.")
        chosen = {**self._defaults, **options}
        score = partial(self._scores, _function(chosen["function_to_apply"], self.config), _count(chosen["top_k"]))
        if is_one_image(images):
            return score(self._images.one(images))
        results = _each(score, self._images.many(images))
        return list(results) if isinstance(images, list | tuple) or hasattr(images, "__array__") else results

    def _scores(self, function: str, top_k: int | None, logits: Float32[np.ndarray, " labels"]) -> Scores:
        scores = _FUNCTIONS[function](logits)
        best = np.argsort(-scores, stable=True)[:top_k]
        return [{"label": self._labels[int(index)], "score": float(scores[index])} for index in best]


def pipeline(
    task: str,
    model: str | os.PathLike[str] | FlaxPoolFormerForImageClassification,
    *,
    image_processor: PoolFormerImageProcessor | None = None,
    top_k: int | None = 5,
    function_to_apply: FunctionToApply | None = None,
    dtype: Dtype = jnp.float32,
    batch_size: int = 32,
    kernels: KernelMode = "auto",
    devices: Sequence[jax.Device] | None = None,
    decode_threads: int | None = None,
    runtime: str = "jax",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> ImageClassificationPipeline:
    """As `transformers.pipeline("image-classification", ...)`: images in, labels and scores out.

    Args:
        task: "image-classification".
        model: a name on the Hub ("sail/poolformer_s12"), a model folder, a weights file, or a model with its
            parameters, which `FlaxPoolFormerForImageClassification.from_pretrained` loads with more options.
        image_processor: the preprocessing; by default the one saved with the weights, or else that of the published
            variant of this architecture.
        top_k: number of labels, at most the number of classes; None for all.
            (In transformers, None gives five.)
        function_to_apply: from logits to scores: "softmax", "sigmoid" or "none". None follows the config's
            problem_type: "none" for regression, "sigmoid" for multi-label classification or a single label, and
            otherwise "softmax".
        dtype: type that feature maps are computed in, float32 or bfloat16.
        batch_size: images per batch, rounded up to a multiple of the number of devices.
        kernels: "auto", "on" or "off", as in `ImageClassifier`.
        devices: the devices to compute on; by default all devices of this process.
        decode_threads: threads that decode and resize; by default one per core that this process may use.
        runtime: "jax", "openvino" or "onnxruntime", as in `ImageClassifier`.
        revision: branch, tag or commit on the Hub.
        cache_dir: the Hub's cache; by default huggingface_hub's (HF_HOME).
        local_files_only: use the cache without asking the Hub.
        token: for private models on the Hub.

    Returns:
        A pipeline, called as `pipe(images, top_k=..., function_to_apply=...)`. It gives a list of
        `{"label": ..., "score": ...}` for one image, highest score first; a list of these lists for a list of images;
        an iterator over them for any other iterable.

    Raises:
        ValueError: for another task, or if the network has no head or its preprocessing is unknown or does not fit.
        ModuleNotFoundError: if the runtime is not installed.
    """
    if task != _TASK:
        raise InputError(f"There is no pipeline for {task!r}. Expected {_TASK!r}.")
    if isinstance(model, FlaxPoolFormerForImageClassification):
        processor = image_processor or default_image_processor(model.config)
        if processor is None:
            raise InputError("This is not a published network, whose preprocessing is known. Pass image_processor=...")
        config, variables, labels = model.config, {"params": model.params}, class_names(model.config)
    else:
        opened = open_model(
            model, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        processor = image_processor or opened.image_processor
        config, variables, labels = opened.config, build_model(opened)[1], opened.labels
    if config.num_labels == 0:
        raise InputError("The network has no head (num_labels=0): expected a label. Use ImageEmbedder instead.")
    logits = open_stream(
        config,
        variables,
        processor,
        fastest_network,
        "logits",
        dtype=dtype,
        batch_size=batch_size,
        kernels=kernels,
        devices=devices,
        decode_threads=decode_threads,
        runtime=runtime,
    )
    return ImageClassificationPipeline(
        config, processor, labels, logits, top_k=top_k, function_to_apply=function_to_apply
    )


def _function(name: str | None, config: PoolFormerConfig) -> str:
    if name is None:
        problem = config.problem_type
        if problem == "regression":
            return "none"
        return "sigmoid" if problem == "multi_label_classification" or config.num_labels == 1 else "softmax"
    if name not in _FUNCTIONS:
        raise InputError(f"function_to_apply={name!r}: expected one of {', '.join(_FUNCTIONS)}, or None.")
    return name


def _count(top_k: int | None) -> int | None:
    if top_k is not None:
        check_at_least_one(top_k=top_k)
    return top_k


def _each(score: Any, rows: Generator[Any]) -> Iterator[Scores]:
    with closing(rows):
        for row in rows:
            if isinstance(row, ImageError):
                raise row
            yield score(row)


def _softmax(logits: Float32[np.ndarray, " labels"]) -> Float32[np.ndarray, " labels"]:
    powers = np.exp(logits - logits.max())
    scores: Float32[np.ndarray, " labels"] = powers / powers.sum()
    return scores


_FUNCTIONS: dict[str, Any] = {
    "softmax": _softmax,
    "sigmoid": lambda logits: 1 / (1 + np.exp(-logits)),
    "none": lambda logits: logits,
}
