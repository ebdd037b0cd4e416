"""`cam`: the overlay of Grad-CAM on an image."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from poolformer_jax.cli.arguments import add_weights, waiting

NAME = "cam"
HELP = "Write a picture of what speaks for a class (Grad-CAM)."
EXAMPLE = """  python -m poolformer_jax cam cat.jpg
  python -m poolformer_jax cam 7.png --weights runs/digits/model --label 1"""


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
    with waiting("Starting JAX"):
        from PIL import Image

        from poolformer_jax.cam import VISIBLE_SIDE, GradCam
        from poolformer_jax.inference import class_names, find_image_processor
        from poolformer_jax.pretrained import load_pretrained
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {output}: expected the ending of an image format, such as .png.")
    with waiting(f"Loading {arguments.weights}"):
        model, variables = load_pretrained(arguments.weights)
        cam = GradCam(model.config, variables, find_image_processor(arguments.weights, model.config))
    names = class_names(model.config)
    label = None if arguments.label is None else _index(arguments.label, names)
    with waiting(f"Explaining {arguments.image}"):
        explanation = cam(arguments.image, label)
        temporary = output.with_name(f".tmp_{output.name}")
        Image.fromarray(explanation.overlay(VISIBLE_SIDE)).save(temporary)
        temporary.replace(output)
    print(f"{output}: {names[explanation.label]}, {100 * explanation.probability:.1f} %")
    return 0


def _index(label: str, names: Mapping[int, str]) -> int:
    """The class called `label`, or with that index."""
    if matches := [index for index, name in names.items() if label in (name, *name.split(", "))]:
        return matches[0]
    if label.isdecimal() and int(label) in names:
        return int(label)
    raise ValueError(f"There is no class {label!r}. Expected a name or an index from 0 to {len(names) - 1}.")
