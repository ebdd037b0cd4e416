"""`embed`: the features of images, in a file."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from poolformer_jax.cli.arguments import (
    add_batches,
    add_images,
    add_runtime,
    add_weights,
    batch_options,
    image_files,
    source_options,
    starting_jax,
    waiting,
)
from poolformer_jax.errors import InputError, MissingDependencyError
from poolformer_jax.files import replace_atomically
from poolformer_jax.messages import MAX_MESSAGE, printable, printable_message
from poolformer_jax.process import print_error

NAME = "embed"
HELP = "Write the features of images into a file."
EXAMPLE = """  python -m poolformer_jax embed photographs/ --output features.npz
  python -m poolformer_jax embed cat.jpg --feature-maps --output cat.npz

The features are the pooled, normalised ones that the head takes. The ending
of FILE chooses the format:
  .npz      images, features; with --feature-maps also stage_0, stage_1, ...
  .npy      features; NaN in the row of an image that could not be read
  .parquet  image, features. Needs: pip install -e '.[parquet]'

Exit code 0 if every image was read. An image that could not be read is
reported and left out, and the exit code is 1. The features are kept in memory
until the file is written."""

_FORMATS = (".npz", ".npy", ".parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_images(parser)
    add_weights(parser)
    parser.add_argument(
        "--output", metavar="FILE", required=True, help=f"the file to write; ends in {', '.join(_FORMATS)}"
    )
    parser.add_argument("--feature-maps", action="store_true", help="also the output of every stage (.npz)")
    add_batches(parser)
    add_runtime(parser)


def run(arguments: argparse.Namespace) -> int:
    """Writes the features; returns the exit code."""
    output = _check_output(arguments)
    paths = image_files(arguments)
    with starting_jax():
        from poolformer_jax.images import ImageError
        from poolformer_jax.inference import ImageEmbedder
    with waiting(f"Loading {arguments.weights}"):
        embedder = ImageEmbedder.from_pretrained(
            arguments.weights,
            feature_maps=arguments.feature_maps,
            runtime=arguments.runtime,
            **batch_options(arguments, len(paths)),
            **source_options(arguments),
        )
    results, embeddings = embedder.stream(paths), []
    for number, path in enumerate(paths, start=1):
        with waiting(f"Embedding image {number} of {len(paths)}"):
            result = next(results)
        if isinstance(result, ImageError):
            print_error(printable_message(f"{os.fspath(path)}: {result}"))
        embeddings.append(None if isinstance(result, ImageError) else result)
    read = [embedding for embedding in embeddings if embedding is not None]
    if not read:
        raise InputError("No image could be read: nothing was written.")
    with waiting(f"Writing {output}"), replace_atomically(output) as temporary:
        _WRITERS[output.suffix.lower()](temporary, [str(path) for path in paths], embeddings)
    print(
        f"{printable(output, MAX_MESSAGE)}: {len(read)} of {len(paths)} images, {len(read[0].features)} features each"
    )
    return 0 if len(read) == len(paths) else 1


def _check_output(arguments: argparse.Namespace) -> Path:
    output = Path(arguments.output).expanduser()
    suffix = output.suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"--output {output}: expected a file that ends in {', '.join(_FORMATS)}.")
    if arguments.feature_maps and suffix != ".npz":
        raise InputError(f"--feature-maps: {suffix} holds only pooled features. Expected a file that ends in .npz.")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingDependencyError("Writing Parquet needs pyarrow. Install it with: pip install -e '.[parquet]'")
    return output


def _write_npz(file: Path, images: list[str], embeddings: list[Any]) -> None:
    import numpy as np

    names, read = _read_only(images, embeddings)
    maps = zip(*(embedding.feature_maps for embedding in read))
    stages: dict[str, Any] = {f"stage_{index}": np.stack(stage) for index, stage in enumerate(maps)}
    np.savez(file, images=np.array(names), features=np.stack([embedding.features for embedding in read]), **stages)


def _write_npy(file: Path, images: list[str], embeddings: list[Any]) -> None:
    import numpy as np

    size = len(next(embedding for embedding in embeddings if embedding is not None).features)
    missing = np.full(size, np.nan, np.float32)
    np.save(file, np.stack([missing if embedding is None else embedding.features for embedding in embeddings]))


def _write_parquet(file: Path, images: list[str], embeddings: list[Any]) -> None:
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    names, read = _read_only(images, embeddings)
    names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]  # they may not be UTF-8
    values = pyarrow.array(np.concatenate([embedding.features for embedding in read]))
    features = pyarrow.FixedSizeListArray.from_arrays(values, len(read[0].features))
    parquet.write_table(pyarrow.table({"image": names, "features": features}), file)


_WRITERS = {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}


def _read_only(images: list[str], embeddings: list[Any]) -> tuple[list[str], list[Any]]:
    """Names and embeddings of the images that could be read."""
    pairs = [(image, embedding) for image, embedding in zip(images, embeddings) if embedding is not None]
    return [image for image, _ in pairs], [embedding for _, embedding in pairs]
