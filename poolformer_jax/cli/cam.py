"""`cam`: the overlay of Grad-CAM on an image."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from poolformer_jax.cli.arguments import (
    add_weights,
    source_options,
    starting_jax,
    waiting,
)
from poolformer_jax.errors import InputError
from poolformer_jax.files import replace_atomically
from poolformer_jax.messages import printable

NAME = "cam"
HELP = "Write a picture of where an image shows a class (Grad-CAM)."
EXAMPLE = """  python -m poolformer_jax cam cat.jpg
  python -m poolformer_jax cam 7.png --weights runs/digits/model --label 1"""

# Formats of Pillow for which the overlay needs no further options.
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    add_weights(parser)
    parser.add_argument("--label", metavar="CLASS", help="name or index of the class (default: the most probable)")
    parser.add_argument(
        "--output", metavar="FILE", help="the picture to write (default: IMAGE's name + _cam.png, here)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the overlay; returns the exit code."""
    output = Path(arguments.output or f"{Path(arguments.image).stem}_cam.png")
    if output.suffix.lower() not in _PICTURES:
        raise InputError(f"--output {output}: expected a picture's ending, one of {', '.join(_PICTURES)}.")
    with starting_jax():
        from PIL import Image

        from poolformer_jax.inference import VISIBLE_SIDE, GradCam
        from poolformer_jax.weights import build_model, open_model
    with waiting(f"Loading {arguments.weights}"):
        opened = open_model(arguments.weights, **source_options(arguments))
        model, variables = build_model(opened)
        cam = GradCam(model.config, variables, opened.image_processor)
    label = None if arguments.label is None else label_index(arguments.label, opened.labels)
    with waiting(f"Explaining {arguments.image}"):
        explanation = cam(arguments.image, label)
        with replace_atomically(output) as temporary:
            Image.fromarray(explanation.overlay(VISIBLE_SIDE)).save(temporary)
    print(f"{output}: {printable(opened.labels[explanation.label])}, {100 * explanation.probability:.1f} %")
    return 0


def label_index(label: str, names: Mapping[int, str]) -> int:
    """The index of the class with the name or index `label`."""
    matches = [index for index, name in names.items() if label in (name, *name.split(", "))]
    if len(matches) > 1:  # two classes of ImageNet are called "crane"
        raise InputError(f"The classes {' and '.join(map(str, matches))} are both called {label!r}. Give the index.")
    if matches:
        return matches[0]
    if label.isdecimal() and int(label) in names:
        return int(label)
    raise InputError(f"There is no class {label!r}. Expected a name or an index from 0 to {len(names) - 1}.")
