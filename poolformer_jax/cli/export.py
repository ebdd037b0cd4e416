"""`export`: the network as one file that runs without this package."""

import argparse
from pathlib import Path

from poolformer_jax.cli.arguments import add_weights, positive, source_options, starting_jax, waiting
from poolformer_jax.errors import InputError
from poolformer_jax.messages import MAX_MESSAGE, printable

NAME = "export"
HELP = "Write a network as StableHLO (for jax), OpenVINO IR, or ONNX (for others)."
EXAMPLE = """  python -m poolformer_jax export sail/poolformer_s12 s12.onnx
  python -m poolformer_jax export runs/digits/model digits.stablehlo
  python -m poolformer_jax export sail/poolformer_s12 s12.xml --dtype float16

The ending chooses the format, and the library that loads the file:
  .onnx       onnxruntime.InferenceSession(FILE)
  .xml        openvino.Core().read_model(FILE)
  .stablehlo  jax.export.deserialize(bytes)

None needs this package. Labels and preprocessing are in the metadata of ONNX
and OpenVINO files, and in FILE.json beside StableHLO.

Needs: pip install -e '.[export]', and openvino for .xml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_weights(parser, positional=True)
    parser.add_argument("file", metavar="FILE", help="what to write; ends in .stablehlo, .onnx or .xml (OpenVINO)")
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="side of the input (default: the preprocessing's)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="bfloat16: computed (.stablehlo); float16 (.onnx, .xml), int8 (.onnx): stored (default: %(default)s)",
    )
    parser.add_argument("--uint8", action="store_true", help="take 8-bit pixels, and normalise them in the network")
    parser.add_argument("--probabilities", action="store_true", help="also give the probabilities")


def run(arguments: argparse.Namespace) -> int:
    """Writes the file and prints its difference from the network; returns the exit code."""
    with starting_jax():
        import jax

        from poolformer_jax.export import FORMATS, export_model
        from poolformer_jax.weights import build_model, open_model
    if Path(arguments.file).suffix.lower() not in FORMATS:
        raise InputError(f"{arguments.file}: expected a file that ends in {' or '.join(FORMATS)}.")
    with waiting(f"Loading {arguments.source}"):
        opened = open_model(arguments.source, **source_options(arguments))
        model, variables = build_model(opened)
    size = (arguments.image_size,) * 2 if arguments.image_size else None
    with waiting("Converting, and comparing with the network"):
        difference = export_model(
            arguments.file,
            model.config,
            variables,
            opened.image_processor,
            opened.labels,
            image_size=size,
            dtype=arguments.dtype,
            uint8=arguments.uint8,
            probabilities=arguments.probabilities,
        )
    file = Path(arguments.file).expanduser()
    written = file.stat().st_size + (file.with_suffix(".bin").stat().st_size if file.suffix.lower() == ".xml" else 0)
    float32 = 4 * sum(leaf.size for branch in variables.values() for leaf in jax.tree.leaves(branch))
    if difference is None:
        comparison = "Not compared with the network, which needs onnxruntime."
    else:
        comparison = f"Logits differ from the network's by at most {difference:.1e} of the largest."
    share = f"{100 * written / float32:.0f} % of the parameters' size in float32"
    print(f"{printable(arguments.file, MAX_MESSAGE)}: {written / 1e6:.1f} MB, {share}\n{comparison}")
    if arguments.dtype != "float32":
        print(f"Measure its accuracy: python -m train evaluate {arguments.file} --data ...")
    return 0
