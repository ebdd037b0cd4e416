"""Makes the golden arrays of the authors' five ablation models.

    git clone https://github.com/sail-sg/poolformer
    python tests/golden/make_ablations.py poolformer

Needs torch. timm, of which the models use four small helpers, is replaced by stubs.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from fixture_values import parameter, pixels, uniform

FOLDER = Path(__file__).parent
SIZE = "224x224"
NAMES = ("id_s12", "pppa_s12_224", "ppaa_s12_224", "pppf_s12_224", "ppff_s12_224")


def stub_timm() -> None:
    """Stubs suffice because inference with given weights uses neither initial values nor drop path."""
    modules = {
        "timm.data": {"IMAGENET_DEFAULT_MEAN": None, "IMAGENET_DEFAULT_STD": None},
        "timm.models.layers": {"DropPath": torch.nn.Identity, "trunc_normal_": lambda tensor, std: tensor},
        "timm.models.layers.helpers": {"to_2tuple": lambda value: (value, value)},
        "timm.models.registry": {"register_model": lambda function: function},
    }
    for name in ("timm", "timm.models", *modules):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(modules.get(name, {}))


def sample(name: str, value: torch.Tensor) -> dict[str, np.ndarray]:
    """256 values of a feature map, in the form of the other golden files."""
    flat = value.numpy().ravel()
    index = np.sort(((uniform(f"index/{name}", (256,)) + 1) / 2 * flat.size).astype(np.int64))
    return {
        "shape_nchw": np.array(value.shape),
        "index": index,
        "value": flat[index],
        "mean_std": np.array([flat.mean(), flat.std()]),
    }


def make(name: str, model: torch.nn.Module) -> None:
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(parameter(key, tuple(shape))) for key, shape in shapes.items()})
    model = model.double().eval()
    feature_maps: list[torch.Tensor] = []
    for part in model.network:
        if isinstance(part, torch.nn.Sequential):
            part.register_forward_hook(lambda module, inputs, output: feature_maps.append(output))
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels(f"pixels/{SIZE}", (2, 3, 224, 224))).double())
    arrays = {f"{SIZE}/logits": logits.numpy()}
    for stage, value in enumerate(feature_maps):
        arrays |= {f"{SIZE}/stage{stage}/{key}": part for key, part in sample(f"{name}/{stage}", value).items()}
    np.savez_compressed(FOLDER / f"sail_{name}.npz", **arrays)
    listing = ",\n".join(f"{json.dumps(key)}: {json.dumps(shape)}" for key, shape in shapes.items())
    (FOLDER / f"sail_{name}.json").write_text(f"{{\n{listing}\n}}\n")


def main() -> None:
    stub_timm()
    sys.path.insert(0, sys.argv[1])
    from models import metaformer  # the authors' file

    for name in NAMES:
        make(f"metaformer_{name}", getattr(metaformer, f"metaformer_{name}")())


if __name__ == "__main__":
    main()
