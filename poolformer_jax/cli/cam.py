"""`cam`: the overlay of Grad-CAM on an image."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from poolformer_jax.cli.arguments import add_weights, starting_jax, waiting
from poolformer_jax.errors import InputError, MissingFileError
from poolformer_jax.files import replace_atomically

NAME = "cam"
HELP = "Write a picture of what speaks for a class (Grad-CAM)."
EXAMPLE = """  python -m poolformer_jax cam cat.jpg
  python -m poolformer_jax cam 7.png --weights runs/digits/model --label 1"""

# What Pillow writes that a person can look at.
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
    _check(output)
    with starting_jax():
        from PIL import Image

        from poolformer_jax.inference.classifier import class_names, find_image_processor
        from poolformer_jax.inference.grad_cam import VISIBLE_SIDE, GradCam
        from poolformer_jax.weights.pretrained import load_pretrained
    with waiting(f"Loading {arguments.weights}"):
        model, variables = load_pretrained(arguments.weights)
        cam = GradCam(model.config, variables, find_image_processor(arguments.weights, model.config))
    names = class_names(model.config)
    label = None if arguments.label is None else label_index(arguments.label, names)
    with waiting(f"Explaining {arguments.image}"):
        explanation = cam(arguments.image, label)
        with replace_atomically(output) as temporary:
            Image.fromarray(explanation.overlay(VISIBLE_SIDE)).save(temporary)
    print(f"{output}: {names[explanation.label]}, {100 * explanation.probability:.1f} %")
    return 0


def _check(output: Path) -> None:
    """Refuses what cannot be written, before the network is loaded."""
    if not output.parent.is_dir():
        raise MissingFileError(f"--output {output}: there is no folder {output.parent}. Make it first.")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder. Expected the name of a picture to write.")
    if output.suffix.lower() not in _PICTURES:
        raise InputError(f"--output {output}: expected the ending of a picture, {', '.join(_PICTURES)}.")


def label_index(label: str, names: Mapping[int, str]) -> int:
    """The class called `label`, or with that index."""
    matches = [index for index, name in names.items() if label in (name, *name.split(", "))]
    if len(matches) > 1:  # two of ImageNet's are called "crane"
        raise InputError(f"The classes {' and '.join(map(str, matches))} are both called {label!r}. Give the index.")
    if matches:
        return matches[0]
    if label.isdecimal() and int(label) in names:
        return int(label)
    raise InputError(f"There is no class {label!r}. Expected a name or an index from 0 to {len(names) - 1}.")
