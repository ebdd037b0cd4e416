"""`python -m train evaluate` counts as timm does on ImageNet's test sets, in the layouts in which they are published.

timm reads the folders, maps the labels and scores; the images, generated, are prepared here with Pillow.
"""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from live import peers
from poolformer_jax import PoolFormerImageProcessor, load_pretrained, save_pretrained
from poolformer_jax.images import imagenet_labels, imagenet_wordnet_ids
from train.commands.evaluate import run_evaluation
from train.commands.evaluate_config import EvaluateConfig
from training import ALONE

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.live, pytest.mark.usefixtures("optimised")]
LABELS = (1, 7, 130, 131, 132, 150, 207, 250, 400, 999)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def theirs(timm, tmp_path_factory):
    """A small PoolFormer of timm whose answers differ between images, and its weights in a folder of ours."""
    torch.manual_seed(0)
    network = peers.small_metaformer(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(0, 0.5 if parameter.ndim > 1 else 0.1)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.add_(1)
    folder = tmp_path_factory.mktemp("weights")
    save_file({name: value.numpy() for name, value in network.state_dict().items()}, folder / "timm.safetensors")
    ours, variables = load_pretrained(folder / "timm.safetensors")
    ours = ours.clone(config=dataclasses.replace(ours.config, id2label=imagenet_labels()))
    save_pretrained(folder / "model", ours, variables, image_processor=PoolFormerImageProcessor())
    return network, folder / "model"


def write(root, folders, ending, images=2):
    """Images of 16 x 15 pixels in 258 x 250, which differ after resizing to 255 x 248.

    The middle 224 columns then begin at 15.5: timm takes 16, transformers 15.
    """
    count = 0
    for place, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for number in range(images):
            count += 1
            pixels = np.random.default_rng([place, number]).integers(0, 256, (16, 15, 3), np.uint8)
            picture = Image.fromarray(pixels).resize((258, 250))
            name = ending.format(number=number, count=count)
            picture.save(root / folder / name, "JPEG" if name.lower().endswith("jpeg") else None)
    return root


def prepared(path):
    """As timm's transforms for 224 pixels, crop 0.9 and bicubic."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    scale = 248 / min(picture.size)
    picture = picture.resize([int(edge * scale) for edge in picture.size], Image.Resampling.BICUBIC)
    left, top = (round((edge - 224) / 2) for edge in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224))) / 255
    return torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1)).float()


def by_timm(network, root, class_to_idx=None, valid_labels=None, real=None):
    """(top-1, top-5) in percent."""
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from timm.utils import accuracy

    samples, _ = find_images_and_targets(str(root), class_to_idx=class_to_idx)
    with torch.inference_mode():
        batches = [torch.stack([prepared(path) for path, _ in samples[i : i + 64]]) for i in range(0, len(samples), 64)]
        output = torch.cat([network(batch) for batch in batches])
    if valid_labels is not None:
        output = output[:, valid_labels]
    if real is not None:
        from timm.data.real_labels import RealLabelsImagenet

        labels = RealLabelsImagenet([path for path, _ in samples], real_json=real)
        labels.add_result(output)
        return labels.get_accuracy(1), labels.get_accuracy(5)
    return tuple(value.item() for value in accuracy(output, torch.tensor([label for _, label in samples]), topk=(1, 5)))


def by_us(path, root, tmp_path, **options):
    results = tmp_path / "results.csv"
    config = EvaluateConfig(
        str(path),
        f"folder:{root}",
        variant=None,
        batch_size=64,
        workers=0,
        preprocessing="timm",
        distributed=ALONE,
        results_file=results,
        **options,
    )
    run_evaluation(config, Console(quiet=True))
    header, row = (line.split(",") for line in results.read_text().splitlines())
    figures = dict(zip(header, row))
    return float(figures["top1"]), float(figures["top5"])


@pytest.mark.parametrize("layout", ["val", "sketch"])
def test_sets_with_imagenets_folders(theirs, tmp_path, layout):
    network, path = theirs
    ids = imagenet_wordnet_ids()
    ending = "ILSVRC2012_val_{count:08d}.JPEG" if layout == "val" else "sketch_{number}.JPEG"
    root = write(tmp_path / layout, [ids[label] for label in LABELS], ending)
    expected = by_timm(network, root, class_to_idx={name: label for label, name in ids.items()})
    assert by_us(path, root, tmp_path) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("ending", ["0.00{number}_dog _ dog_0.9.jpeg", "art_{number}.jpg"])
def test_imagenet_a_and_r_are_scored_among_their_classes(theirs, tmp_path, ending):
    network, path = theirs
    root = write(tmp_path / "a", [imagenet_wordnet_ids()[label] for label in LABELS], ending, images=6)
    expected = by_timm(network, root, valid_labels=list(LABELS))
    assert expected[0] > 0
    assert by_us(path, root, tmp_path, classes="data") == pytest.approx(expected, abs=1e-3)


def test_real_labels(theirs, tmp_path):
    network, path = theirs
    root = write(
        tmp_path / "val", [imagenet_wordnet_ids()[label] for label in LABELS], "ILSVRC2012_val_{count:08d}.JPEG"
    )
    answers = np.random.default_rng(0).choice(
        1000, (20, 200)
    )  # many classes, so that a random network is right at times
    real = [row.tolist() if place % 5 else [] for place, row in enumerate(answers)]
    (tmp_path / "real.json").write_text(json.dumps(real))
    class_to_idx = {name: label for label, name in imagenet_wordnet_ids().items()}
    expected = by_timm(network, root, class_to_idx=class_to_idx, real=str(tmp_path / "real.json"))
    assert 0 < expected[1] < 100
    assert by_us(path, root, tmp_path, real_labels=tmp_path / "real.json") == pytest.approx(expected, abs=1e-3)


def test_imagenet_v2_has_folders_of_numbers(theirs, tmp_path):
    network, path = theirs
    root = write(tmp_path / "imagenetv2", [str(label) for label in range(1000)], "{number}.jpeg", images=1)
    assert by_us(path, root, tmp_path) == pytest.approx(by_timm(network, root), abs=1e-3)
