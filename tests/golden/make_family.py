"""Makes the golden arrays of the second paper's networks, `family/*.npz` and `family/*.json`.

    git clone https://github.com/sail-sg/metaformer
    git -C metaformer checkout 64c534a
    python tests/golden/make_family.py metaformer OUTPUT

Needs torch and timm 1.0.31. It takes about an hour on two cores, because PyTorch's float64 convolutions are slow. Add
`--only tiny` for the small networks. The stored files are of the same arrays; the sampled positions of feature maps
may differ.
"""

import argparse
import importlib
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from fixture_values import parameter, pixels, uniform
from timm.models import metaformer
from torch import nn

POOLING_SIZES, CONVOLUTION_SIZES = ("s12", "s24", "s36", "m36", "m48"), ("s18", "s36", "m36", "b36")
KINDS = {
    **dict.fromkeys(("poolformerv2", "identityformer", "randformer"), POOLING_SIZES),
    **dict.fromkeys(("convformer", "caformer"), CONVOLUTION_SIZES),
}
TINY = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64], "num_classes": 10}


class RandomMixing(nn.Module):
    """The authors' mixer for timm's NCHW maps; timm has no RandFormer. timm wants a class for each number of tokens."""

    num_tokens: int

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.random_matrix = nn.Parameter(torch.zeros(self.num_tokens, self.num_tokens), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("mn,bcn->bcm", self.random_matrix, x.flatten(2)).reshape(x.shape)


def load_authors(folder: str) -> Any:
    """The authors' file, which was written for timm 0.4; its models are not registered, so that timm keeps its own."""
    stubs = {
        "timm.models.layers": {"DropPath": timm.layers.DropPath, "trunc_normal_": timm.layers.trunc_normal_},
        "timm.models.layers.helpers": {"to_2tuple": timm.layers.to_2tuple},
        "timm.models.registry": {"register_model": lambda function: function},
    }
    for name, members in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    sys.path.insert(0, folder)
    return importlib.import_module("metaformer_baselines")


def timms_model(kind: str, size: str) -> nn.Module:
    """timm's model; of the kinds that timm does not have, timm's class with their mixers."""
    names, tokens = timm.list_models(f"{kind}_*"), (16, 4) if size == "tiny" else (196, 49)
    if f"{kind}_{size}" in names:
        return timm.create_model(f"{kind}_{size}")
    matrices = [type("RandomMixingOf", (RandomMixing,), {"num_tokens": count}) for count in tokens]
    mixers: dict[str, list[Any]] = {
        "poolformerv2": [metaformer.Pooling] * 4,
        "identityformer": [nn.Identity] * 4,
        "randformer": [nn.Identity, nn.Identity, *matrices],
        "convformer": [metaformer.SepConv] * 4,
        "caformer": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
    }
    layer, last = metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias
    norms = {"convformer": layer, "caformer": [layer] * 2 + [last] * 2}.get(kind, metaformer.GroupNorm1NoBias)
    sizes = TINY if size == "tiny" else {"depths": [2, 2, 6, 2], "dims": [64, 128, 320, 512]}
    head = kind in ("convformer", "caformer")
    return metaformer.MetaFormer(token_mixers=mixers[kind], norm_layers=norms, use_mlp_head=head, **sizes)


def authors_model(authors: Any, kind: str, size: str) -> nn.Module:
    """The authors' model, or their class with the arguments of a small network."""
    if size != "tiny":
        return getattr(authors, f"{kind}_{size}")()
    matrices = [partial(authors.RandomMixing, num_tokens=count) for count in (16, 4)]
    mixers: dict[str, Any] = {
        "poolformerv2": authors.Pooling,
        "identityformer": nn.Identity,
        "randformer": [nn.Identity, nn.Identity, *matrices],
        "convformer": authors.SepConv,
        "caformer": [authors.SepConv, authors.SepConv, authors.Attention, authors.Attention],
    }
    if kind in ("convformer", "caformer"):
        return authors.MetaFormer(token_mixers=mixers[kind], head_fn=authors.MlpHead, **TINY)
    norm = partial(authors.LayerNormGeneral, normalized_dim=(1, 2, 3), eps=1e-6, bias=False)
    return authors.MetaFormer(token_mixers=mixers[kind], norm_layers=norm, **TINY)


def fill(model: nn.Module) -> dict[str, list[int]]:
    """Sets every parameter to the values of its name; returns the shapes."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(parameter(name, tuple(shape))) for name, shape in shapes.items()})
    model.double().eval()
    return shapes


def outputs(model: nn.Module, nhwc: bool, images: int, height: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits, and the feature map of every stage as NCHW."""
    maps: list[np.ndarray] = []
    handles = [
        stage.register_forward_hook(
            lambda _, __, output: maps.append((output.permute(0, 3, 1, 2) if nhwc else output).detach().numpy())
        )
        for stage in model.stages
    ]
    with torch.no_grad():
        logits = model(image(images, height, width)).numpy()
    for handle in handles:
        handle.remove()
    return logits, maps


def image(images: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(pixels(f"pixels/{height}x{width}", (images, 3, height, width))).double()


def sample(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """256 values of a feature map."""
    flat = value.ravel()
    index = np.sort(((uniform(f"index/{name}", (256,)) + 1) / 2 * flat.size).astype(np.int64))
    statistics = np.array([flat.mean(), flat.std()])
    return {"shape_nchw": np.array(value.shape), "index": index, "value": flat[index], "mean_std": statistics}


def gradients(model: nn.Module, labels: list[int], side: int, values: int) -> dict[str, np.ndarray]:
    """Loss and gradients of the mean cross entropy, each with its norm, a product with a probe, and some values."""
    given = image(len(labels), side, side).requires_grad_()
    loss = nn.functional.cross_entropy(model(given), torch.tensor(labels))
    loss.backward()
    found = {"grad/loss": loss.detach().numpy(), "grad/labels": np.array(labels)}
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in {"pixels": given, **trained}.items():
        gradient = value.grad.numpy()
        index = ((uniform(f"index/{name}", (values,)) + 1) / 2 * gradient.size).astype(np.int64)
        product = np.sum(gradient * uniform(f"probe/{name}", gradient.shape))
        numbers = [np.linalg.norm(gradient), product, *index, *gradient.ravel()[index]]
        found[f"grad/{name}/l2_probe_index_value"] = np.array(numbers)
    return found


def make_tiny(folder: Path, home: str, kind: str, model: nn.Module) -> None:
    sizes = [(64, 64), (32, 128)] + [(70, 93)] * (kind != "randformer")
    arrays: dict[str, np.ndarray] = {}
    for height, width in sizes:
        size = f"{height}x{width}"
        arrays[f"{size}/logits"], maps = outputs(model, home == "sail", 2, height, width)
        for stage, value in enumerate(maps):
            parts = {"nchw": value} if size == "64x64" else sample(f"{home}/{kind}/{size}/{stage}", value)
            arrays |= {f"{size}/stage{stage}/{key}": part for key, part in parts.items()}
    np.savez_compressed(folder / f"{home}_{kind}_tiny.npz", **arrays, **gradients(model, [3, 7], 64, 32))


def make_smallest(folder: Path, home: str, name: str, model: nn.Module) -> None:
    odd = [(1, 160, 224), (1, 225, 193)] * (home == "timm" and not name.startswith("randformer"))
    arrays = {}
    for images, height, width in [(2, 224, 224), *odd]:
        size = f"{height}x{width}"
        arrays[f"{size}/logits"], maps = outputs(model, home == "sail", images, height, width)
        for stage, value in enumerate(maps):
            parts = sample(f"{home}/{name}/{size}/{stage}", value)
            arrays |= {f"{size}/stage{stage}/{key}": part for key, part in parts.items()}
    np.savez_compressed(folder / f"{home}_{name}.npz", **arrays)


def make_384_and_21841_classes(folder: Path) -> None:
    name = "caformer_s18"
    model = timm.create_model(name)
    fill(model)
    arrays: dict[str, np.ndarray] = {}
    arrays["384x384/logits"], maps = outputs(model, False, 1, 384, 384)
    for stage, value in enumerate(maps):
        parts = sample(f"timm/{name}/384x384/{stage}", value)
        arrays |= {f"384x384/stage{stage}/{key}": part for key, part in parts.items()}
    model = timm.create_model(name, num_classes=21841)
    fill(model)
    logits = outputs(model, False, 1, 224, 224)[0].ravel()
    index = np.sort(((uniform(f"index/{name}/in22k", (512,)) + 1) / 2 * logits.size).astype(np.int64))
    arrays |= {"224x224/in22k_logits/index": index, "224x224/in22k_logits/value": logits[index]}
    np.savez_compressed(folder / f"timm_{name}_384_and_in22k.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", help="a clone of sail-sg/metaformer")
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=["tiny"])
    options = parser.parse_args()
    authors = load_authors(options.authors)
    options.output.mkdir(parents=True, exist_ok=True)
    logits: dict[str, np.ndarray] = {}
    for kind, sizes in KINDS.items():
        for size in ("tiny", *sizes)[: 1 if options.only else None]:
            for home in ("timm", "sail"):
                if home == "timm" and kind in ("identityformer", "randformer") and size not in ("tiny", "s12"):
                    continue
                model = timms_model(kind, size) if home == "timm" else authors_model(authors, kind, size)
                shapes = fill(model)
                if size == "tiny":
                    make_tiny(options.output, home, kind, model)
                elif size == sizes[0]:
                    make_smallest(options.output, home, f"{kind}_{size}", model)
                else:
                    logits[f"{home}_{kind}_{size}"] = outputs(model, home == "sail", 1, 224, 224)[0]
                    continue
                listing = ",\n".join(f"{json.dumps(name)}: {json.dumps(shape)}" for name, shape in shapes.items())
                (options.output / f"{home}_{kind}_{size}.json").write_text(f"{{\n{listing}\n}}\n")
    if not options.only:
        np.savez_compressed(options.output / "logits_224x224.npz", **logits)
        make_384_and_21841_classes(options.output)


if __name__ == "__main__":
    main()
