"""`list`: the published networks."""

import argparse
from typing import Any

from poolformer_jax.cli.arguments import starting_jax, waiting

NAME = "list"
HELP = "List the variants with their parameters, MACs and published accuracy."
EXAMPLE = "  python -m poolformer_jax list"

# (image size, whether pretrained on ImageNet-21k) of the four columns of accuracies.
_COLUMNS = ((224, False), (384, False), (224, True), (384, True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments: none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints a row per variant, family by family; returns the exit code."""
    with starting_jax():
        from poolformer_jax.inference import count_macs
        from poolformer_jax.network import BASELINES, FAMILIES, PoolFormerConfig, count_parameters
    print(f"{'':49}top-1     after 21k")
    print(f"{'variant':24}{'parameters':>12}{'MACs':>9}" + "".join(f"{size:6}" for size, _ in _COLUMNS) + "  depths")
    for family in FAMILIES:
        print(f"\n{family.title}")
        for name, fields in family.variants.items():
            with waiting(f"Counting {name}"):
                config = PoolFormerConfig.from_variant(name)
                parameters, macs = count_parameters(config), count_macs(config)
            accuracies = "".join(f"{_accuracy(family.results.get(name, ()), column):>6}" for column in _COLUMNS)
            depths = "-".join(map(str, fields["depths"]))
            print(f"{name:24}{parameters:12,}{macs / 1e9:7.2f} G{accuracies}  {depths}")
    print("\nThe first paper's abstract compares m36 with these; they are not in this package")
    for name, other in BASELINES.items():
        print(f"{name:24}{other.parameters:12,}{other.macs / 1e9:7.2f} G{other.top_1:6}")
    print("\nParameters with 1000 labels; RandFormer also stores matrices that it does not")
    print("learn. MACs of a 224 x 224 image by fvcore's rules, which leave out the norms of")
    print("the second paper. Top-1: percent of ImageNet-1k at 224 and 384 pixels, trained")
    print("from scratch or after ImageNet-21k.")
    for source in dict.fromkeys(family.source for family in FAMILIES):
        print(f"Source: {source}.")
    return 0


def _accuracy(results: Any, column: tuple[int, bool]) -> str:
    image_size, pretrained = column
    for result in results:
        if result.image_size == image_size:
            top_1 = result.top_1_in21k if pretrained else result.top_1
            return "-" if top_1 is None else f"{top_1:.1f}"
    return "-"
