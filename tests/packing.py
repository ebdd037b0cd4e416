"""Folders and archives of pictures for `prepare`."""

import io
import tarfile
import tracemalloc  # noqa: F401 - pytest may import it while TFDS replaces Python's import, which fails

import numpy as np
import scipy.io
from PIL import Image

from train.data import PrepareConfig


def jpeg(seed):
    """A small JPEG that is different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 48)).save(file, "JPEG")
    return file.getvalue()


def write_folder(root, classes=3, images=20):
    """Class folders of JPEGs in `root`, and the config that packs them, 8 to a shard."""
    for label in range(classes):
        for number in range(images):
            path = root / "photos" / f"class {label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg([label, number]))
    return PrepareConfig(source=f"folder:{root / 'photos'}", output=root / "packed", images_per_shard=8, threads=2)


def examples_of(source):
    """The examples of a packed split by the names of their files."""
    return {source[index]["id"].split(" ", 1)[1]: source[index] for index in range(len(source))}


# ILSVRC2012 in small: three classes, two of which have the same name, and one group of classes.
SYNSETS = [(1, "n03126707", "crane", 0), (2, "n01440764", "tench, Tinca tinca", 0), (3, "n02012849", "crane", 0)]


GROUP = (4, "n00015388", "animal", 3)


VALIDATION = [2, 3, 1, 1, 2]


def add(archive, name, data):
    """Adds a file to a tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_archives(root):
    """ILSVRC2012's three archives in `root`, and the config that packs them."""
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, name, _, _ in SYNSETS:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for image in range(4):
                    add(inner, f"{name}_{image}.JPEG", jpeg([number, image]))
            add(outer, f"{name}.tar", file.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for image in reversed(range(len(VALIDATION))):
            add(archive, f"ILSVRC2012_val_{image + 1:08d}.JPEG", jpeg([100, image]))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([*SYNSETS, GROUP], dtype=kinds)})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in VALIDATION)
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return PrepareConfig(source=f"imagenet:{root}", output=root.parent / "packed", images_per_shard=5)
