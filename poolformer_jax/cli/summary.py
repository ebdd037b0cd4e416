"""`summary`: the layers of one network."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolformer_jax.cli.arguments import add_source_options, positive, source_options, starting_jax, waiting
from poolformer_jax.errors import InputError
from poolformer_jax.hub import ACCESS_OPTIONS

if TYPE_CHECKING:
    from poolformer_jax.network import PoolFormerConfig

NAME = "summary"
HELP = "Print a network's layers with their output shapes, parameters and MACs."
EXAMPLE = """  python -m poolformer_jax summary s12
  python -m poolformer_jax summary runs/digits/model --image-size 32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "network",
        metavar="NETWORK",
        help="a variant (see list), a model folder, a weights file, a config.json, or a name on the Hugging Face Hub",
    )
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="side of the input image (default: 224)")
    add_source_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    with starting_jax():
        from poolformer_jax.inference import layer_table
    with waiting(f"Reading {arguments.network}"):
        config = _config(arguments.network, **source_options(arguments))
    side = arguments.image_size or config.image_size or 224
    rows = layer_table(config, side, side)
    width = max(len(row.name) for row in rows)
    print(f"{'layer':{width}} {'output':>15} {'parameters':>11} {'MACs':>9}")
    for row in rows:
        shape = " x ".join(map(str, row.output_shape))
        print(f"{row.name:{width}} {shape:>15} {row.parameters:11,} {row.macs / 1e6:7.1f} M")
    parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    print(f"{'total':{width}} {'':15} {parameters:11,} {macs / 1e6:7.1f} M")
    print(f"\nOutput shapes (height x width x channels) and MACs are for one {side} x {side} image.")
    return 0


def _config(network: str, **options: Any) -> "PoolFormerConfig":
    from poolformer_jax.network import VARIANTS, PoolFormerConfig
    from poolformer_jax.weights import is_index, open_model, read_config

    path = Path(network).expanduser()
    config: PoolFormerConfig | None = None
    if network.removeprefix("poolformer_") in VARIANTS or not (path.exists() or "/" in network):
        config = PoolFormerConfig.from_variant(network)
    elif path.suffix == ".json" and not is_index(path):
        config = read_config(path)
        network = network if config else str(path.parent)  # timm's config.json does not describe the layers
    if config is None:
        return open_model(network, **options).config
    if given := [name for name, value in options.items() if value and name not in ACCESS_OPTIONS]:
        raise InputError(
            f"{network} is summarised without reading weights. Expected no {', '.join(given)}, for which NETWORK has "
            "to be a weights file, its folder, or a name on the Hub."
        )
    return config
