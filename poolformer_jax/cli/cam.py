"""`cam`: the overlay of Grad-CAM on an image."""

import argparse
from pathlib import Path

from poolformer_jax.cli.arguments import add_weights, source_options, starting_jax, waiting
from poolformer_jax.errors import InputError
from poolformer_jax.files import replace_atomically
from poolformer_jax.messages import MAX_MESSAGE, printable

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
    with waiting(f"Loading {arguments.weights}"):
        cam = GradCam.from_pretrained(arguments.weights, **source_options(arguments))
    with waiting(f"Explaining {arguments.image}"):
        explanation = cam(arguments.image, arguments.label)
        with replace_atomically(output) as temporary:
            Image.fromarray(explanation.overlay(VISIBLE_SIDE)).save(temporary)
    label = printable(cam.id2label[explanation.label])
    print(f"{printable(output, MAX_MESSAGE)}: {label}, {100 * explanation.probability:.1f} %")
    return 0
