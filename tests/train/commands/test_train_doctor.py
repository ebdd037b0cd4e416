"""The doctor finds what would stop a long run, and says how to fix it."""

import dataclasses
import io
import math
import re
import shutil

import pytest
from PIL import Image
from rich.console import Console

from doctor_runs import failures, findings, of_folder
from poolformer_jax import GpuKernels, TpuKernels
from poolformer_jax.network.fused import Verification
from poolformer_jax.network.fused.kernels import verification
from train.commands import doctor
from train.commands.doctor import print_findings
from train.config import PretrainedNetwork
from train.data import DeviceAugmentation
from training import NETWORK, sharded, tiny

pytestmark = pytest.mark.usefixtures("only_requested_steps_are_compiled")


def test_a_sound_recipe_has_no_failure_and_is_measured(folder, tmp_path, compiled_step):
    found = findings(of_folder(folder, tmp_path))
    assert {finding.level for finding in found} <= {"fine", "warning"}
    subjects = [finding.subject for finding in found]
    assert {"devices", "data, train", "data, validation", "host memory", "disk", "run folder", "device memory"} <= set(
        subjects
    )
    memory = found[subjects.index("device memory")].found
    assert re.search(r"the compiled step needs [\d.]+ [MG]B of the [\d.]+ [MG]B", memory)
    assert not (tmp_path / "run").exists(), "the doctor leaves nothing behind"


def test_classes_are_named_and_splits_taken_for_classes_are_a_warning(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    assert findings(config, "data, train")[0].found == "16 images of 2 classes (cat, dog)"
    assert all(finding.level == "fine" for finding in findings(config, "classes"))
    (folder / "train").rename(folder / "Train")
    (folder / "validation").rename(folder / "Val")
    assert any("Train, Val look like splits" in finding.found for finding in findings(config))


def test_a_class_without_held_out_images_is_a_warning(folder, tmp_path):
    for image in (folder / "validation" / "dog").iterdir():
        image.unlink()
    (folder / "validation" / "dog").rmdir()
    (found,) = findings(of_folder(folder, tmp_path), "classes")
    assert found.level == "warning"
    assert "1 have no held-out image, so their accuracy stays unknown: dog" in found.found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "2 steps an epoch, 8 in all, 2 of them warm-up: too few to learn much"),
        ({"max_steps": 2}, "2 in all, 2 of them warm-up: the learning rate never reaches its peak"),
    ],
)
def test_a_run_of_few_steps_is_a_warning(folder, tmp_path, changes, expected):
    (found,) = findings(of_folder(folder, tmp_path, **changes), "steps")
    assert found.level == "warning" and expected in found.found


def test_an_unreadable_image_and_an_unreadable_file_are_named(folder, tmp_path):
    (folder / "train" / "cat" / "3.png").write_bytes(b"not an image")
    (folder / "train" / "dog" / "4.png").unlink()
    (folder / "train" / "dog" / "4.png").symlink_to(tmp_path / "nowhere")
    (found,) = failures(of_folder(folder, tmp_path))
    assert "2 of 16 sampled images cannot be read" in found.found
    assert "cat/3.png" in found.found
    assert "dog/4.png: its file cannot be read: No such file" in found.found
    assert "--data.on-bad-image skip" in found.remedy


def test_a_single_class_is_a_failure(folder, tmp_path):
    config = of_folder(folder / "train", tmp_path)
    shutil.rmtree(folder / "train" / "dog")
    (found,) = failures(config)
    assert (found.subject, found.found) == ("classes", "there is only one, cat, so every answer would be right")


def with_targets(tmp_path, problem, columns):
    """A run on 16 images with two targets each."""
    for number in range(16):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.csv").write_text("file_name,red,dark\n" + "".join(f"{n}.png,{n % 2},1\n" for n in range(16)))
    data = dataclasses.replace(
        tiny().data,
        source=f"labels:{tmp_path}/labels.csv",
        label_column=columns,
        problem_type=problem,
        held_out=0.5,
        batch_size=8,
        mix=DeviceAugmentation(mixup=0.0, cutmix=0.0, label_smoothing=0.0, erase_probability=0.0),
    )
    return tiny(tmp_path / "run", data=data, mesh=sharded(8, 1))


@pytest.mark.parametrize(("problem", "columns"), [("multi_label_classification", "red,dark"), ("regression", "dark")])
def test_several_targets_or_a_single_number_are_sound(tmp_path, problem, columns):
    found = findings(with_targets(tmp_path, problem, columns))
    assert found[-1].subject == "device memory"
    assert not [finding for finding in found if finding.level == "failure" or finding.subject == "classes"]


@pytest.mark.slow
def test_the_step_of_a_run_with_several_targets_is_measured(tmp_path, compiled_step):
    assert not failures(with_targets(tmp_path, "multi_label_classification", "red,dark"))


def test_files_that_are_not_images_are_counted(folder, tmp_path):
    for name in ("a.heics", "b.HEICS", "notes"):
        (folder / "train" / "cat" / name).write_bytes(b"no image")
    found, *_ = findings(of_folder(folder, tmp_path), "data, train")
    assert found.found.startswith("16 images of 2 classes (cat, dog); passed over 3 other files: 2 .heics, 1 without a")


def test_a_missing_split_is_a_failure(folder, tmp_path):
    (found,) = failures(of_folder(folder, tmp_path, data__evaluation_split="test"))
    assert found.subject == "data, test"


def test_a_batch_that_devices_cannot_share_is_a_failure(folder, tmp_path):
    (found,) = failures(of_folder(folder, tmp_path, data__batch_size=12))
    assert "data.batch_size=12" in found.found


def test_missing_weights_are_a_failure(folder, tmp_path):
    (found,) = failures(of_folder(folder, tmp_path, model=PretrainedNetwork(source=f"{tmp_path}/missing")))
    assert found.subject == "network, batch and devices" and "There is no model" in found.found


def test_the_report_fits_the_screen_and_gives_an_exit_code(folder, tmp_path):
    (folder / "train" / "cat" / "3.png").write_bytes(b"not an image")
    console = Console(file=io.StringIO(), width=80)
    assert print_findings(iter(findings(of_folder(folder, tmp_path))), console) == 1
    text = console.file.getvalue()
    assert "1 of these would stop the run" in text
    words = [word for word in text.split() if len(word) > 60]
    assert max(len(line) for line in text.splitlines() if not any(word in line for word in words)) <= 80
    assert print_findings(iter([]), console) == 0


@pytest.mark.parametrize(
    ("kernels", "batch_size", "accumulate", "stages", "multiple"),
    [
        (TpuKernels, 8, 1, "0, 1", 16),
        (TpuKernels, 256, 4, "0, 1", 16),  # 8 images at a time on each of the eight devices
        (TpuKernels, 256, 2, None, 16),
        # Maps of 4 x 4 and of 2 x 2 positions.
        (GpuKernels, 8, 1, "0, 1", 64),
        (GpuKernels, 32, 1, "1", 64),
        (GpuKernels, 512, 1, None, 64),
    ],
)
def test_a_batch_that_kernels_do_not_support_is_a_warning(
    folder, tmp_path, monkeypatch, kernels, batch_size, accumulate, stages, multiple
):
    monkeypatch.setattr(verification, "kernels_for", kernels)
    monkeypatch.setattr(verification, "verify_kernels", lambda *_, **__: Verification(0.01, "mlp_gradient, stage 0"))
    config = of_folder(
        folder,
        tmp_path,
        data__batch_size=batch_size,
        data__evaluation_batch_size=8,
        optimizer__accumulate=accumulate,
        model=NETWORK,
        model__hidden_sizes=(64, 96),
        dtype="bfloat16",
    )
    fine, *warned = findings(config, "kernels")
    assert fine.found == "blocks with and without them differ by at most 1.0% (mlp_gradient, stage 0)"
    assert [re.search("support in stages (.*): XLA", finding.found)[1] for finding in warned] == [stages] * bool(stages)
    assert all(f"a multiple of {multiple} images at a time" in finding.remedy for finding in warned)


@pytest.mark.parametrize(("mode", "level"), [("auto", "warning"), ("on", "failure")])
def test_kernels_that_fail_their_check_stop_a_run_only_if_they_are_forced(folder, tmp_path, monkeypatch, mode, level):
    def verify(*_, **__):
        return Verification(math.inf, "mlp_gradient", "mlp_gradient cannot run: no compiler")

    monkeypatch.setattr(verification, "kernels_for", GpuKernels)
    monkeypatch.setattr(verification, "verify_kernels", verify)
    monkeypatch.setattr(doctor, "verify_kernels", verify)
    (found,) = findings(of_folder(folder, tmp_path, model=NETWORK, dtype="bfloat16", kernels=mode), "kernels")
    assert found.level == level
    assert "mlp_gradient cannot run: no compiler" in found.found
    assert "--kernels off" in found.remedy
