"""`list`: the published networks."""

import argparse

from poolformer_jax.cli.arguments import starting_jax, waiting

NAME = "list"
HELP = "List the variants with their parameters, MACs and published accuracy."
EXAMPLE = "  python -m poolformer_jax list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments: none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints a row per variant; returns the exit code."""
    with starting_jax():
        from poolformer_jax.inference import layer_table
        from poolformer_jax.network import SIZES, SOURCE, VARIANTS, PoolFormerConfig
    print(f"{'variant':24} {'parameters':>11} {'MACs':>8} {'top-1':>7}  depths")
    for name in VARIANTS:
        with waiting(f"Counting {name}"):
            config = PoolFormerConfig.from_variant(name)
            layers = layer_table(config)
        parameters, macs = sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers)
        top_1 = f"{SIZES[name].top_1:.1f} %" if name in SIZES else "-"
        depths = "-".join(map(str, config.depths))
        print(f"{name:24} {parameters:11,} {macs / 1e9:6.2f} G {top_1:>7}  {depths}")
    print("\nParameters with 1000 labels. MACs of a 224 x 224 image by fvcore's rules.")
    print(f"Top-1: {SOURCE}.")
    return 0
