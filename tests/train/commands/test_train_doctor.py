"""The doctor finds what would stop a long run, and says how to fix it."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image

from poolformer_jax import GpuKernels, TpuKernels, process
from poolformer_jax.network.fused import Verification
from poolformer_jax.network.fused.kernels import verification
from train import setup
from train.commands import doctor, resource_checks
from train.commands.doctor import examine, print_findings
from train.commands.finding import Finding
from train.config import PretrainedNetwork, TrainConfig
from train.data import DeviceAugmentation, open_source
from train.data.sources import folders
from train.resume.checkpoints import Checkpoints
from train.resume.same_run import identify, network_to_dict
from training import first_state, open_and_make_parts, sharded, tiny


@pytest.fixture
def folder(tmp_path):
    """Class folders with two classes and two splits."""
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def compiled_step():
    """For tests of the compiled training step."""


@pytest.fixture(autouse=True)
def nothing_is_compiled_for_other_tests(request, monkeypatch):
    if "compiled_step" not in request.fixturenames:
        monkeypatch.setattr(doctor, "check_device_memory", lambda *_: Finding("fine", "device memory", "not compiled"))


def of_folder(folder, tmp_path, **changes):
    """The recipe of a tiny run on these images, with `changes` as `tiny` takes them."""
    data = {"data__source": f"folder:{folder}", "data__batch_size": 8}
    return tiny(**{"run_dir": tmp_path / "run", "mesh": sharded(8, 1), **data, **changes})


def findings(config, subject=None):
    return [finding for finding in examine(config) if subject in (None, finding.subject)]


def failures(config):
    return [finding for finding in findings(config) if finding.level == "failure"]


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


def test_a_folder_that_cannot_be_created_is_a_failure_and_nothing_is_written(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    for name, changes in (
        ("file", {"run_dir": tmp_path / "file" / "run"}),
        ("file", {"checkpoint_dir": str(tmp_path / "file")}),
        ("link", {"run_dir": tmp_path / "link"}),
    ):
        (found,) = failures(of_folder(folder, tmp_path, **changes))
        assert found.found == f"nothing can be written below {tmp_path / name}, which is not a folder"
        assert "--run-dir (and --checkpoint-dir" in found.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file", "link"]


def test_a_folder_that_takes_no_files_is_a_failure(folder, tmp_path, monkeypatch):
    (found,) = failures(of_folder(folder, tmp_path, run_dir=tmp_path / ("a" * 300) / "run"))
    assert found.found == f"nothing can be written to {tmp_path}: File name too long"

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor.Path, "write_bytes", no_space)
    (found,) = failures(of_folder(folder, tmp_path))
    assert found.subject == "run folder"
    assert found.found == f"nothing can be written to {tmp_path}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_checkpoints_that_are_never_deleted_need_space_too(folder, tmp_path):
    (disk,) = findings(of_folder(folder, tmp_path, max_steps=4, keep_every=2, keep_checkpoints=3), "disk")
    # Of steps 2 and 4, the newest three, and one that is being written.
    assert disk.found.startswith("6 states of ")


def test_existing_checkpoints_need_no_more_space(folder, tmp_path, monkeypatch):
    config = of_folder(folder, tmp_path, keep_checkpoints=4)
    leaves = jax.tree.leaves(open_and_make_parts(config)[1].abstract_state)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * state))
    for steps, level in (((), "failure"), ((2, 4, 6), "fine")):
        for step in steps:
            (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
        (found,) = findings(config, "disk")
        assert (found.level, "3 of them there already" in found.found) == (level, bool(steps))


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


@pytest.mark.slow
def test_the_memory_of_a_head_only_run_is_that_of_its_features(folder, tmp_path, compiled_step):
    """It computes them in batches of an evaluation, and its training step takes no images."""
    changes = {
        "optimizer__freeze": ("backbone",),
        "model__drop_path_rate": 0.0,
        "data__augment": dataclasses.replace(tiny().data.augment, horizontal_flip=0.0),
    }
    needs = []
    for size in (8, 8000):
        config = of_folder(folder, tmp_path, data__evaluation_batch_size=size, **changes)
        (memory,) = findings(config, "device memory")
        needs.append(float(re.search(r"needs ([\d.]+) MB", memory.found)[1]))
    assert needs[1] > 5 * needs[0]


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


def save_a_state(config):
    run = identify(config, open_source(config.data, "train")) | {"network": network_to_dict(tiny().model)}
    with Checkpoints(config.checkpoints, run) as checkpoints:
        checkpoints.save(first_state(tiny(mesh=sharded(1, 1))))


def test_metrics_without_a_checkpoint_are_a_warning(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n')
    (found,) = findings(config, "run folder")
    assert found.level == "warning"
    assert "metrics up to step 7" in found.found
    save_a_state(config)
    assert all("has metrics up to" not in finding.found for finding in findings(config))


def test_a_run_that_can_resume_needs_no_pretrained_weights(folder, tmp_path):
    config = of_folder(folder, tmp_path, model=PretrainedNetwork(str(tmp_path / "moved away")))
    with pytest.raises(FileNotFoundError):
        findings(config)
    save_a_state(config)
    assert not failures(config)


def test_a_folder_with_another_run_is_a_failure(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    save_a_state(dataclasses.replace(config, seed=1))
    (found,) = failures(config)
    assert "seed: 1 -> 42" in found.found
    assert "--run-dir" in found.remedy


def test_a_run_of_another_version_resumes_and_unknown_fields_are_named(folder, tmp_path, monkeypatch, caplog):
    """Its states and recipe.json lack one field, whose value is the default, and have an unknown one."""

    def of_before(config):
        noted = to_dict(config)
        del noted["data"]["augment"]["scaled_decoding"]
        return noted | {"data": noted["data"] | {"restart_markers": 4}}

    config, to_dict = of_folder(folder, tmp_path), TrainConfig.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "to_dict", of_before)
        save_a_state(config)
        (tmp_path / "run" / "recipe.json").write_text(json.dumps(config.to_dict()))
    assert not failures(config)
    assert "They are ignored: data.restart_markers: 4" in caplog.text
    other = dataclasses.replace(config.data.augment, scaled_decoding=False)
    (found,) = failures(of_folder(folder, tmp_path, data__augment=other))
    assert "data.augment.scaled_decoding: True -> False" in found.found


def test_a_folder_with_the_recipe_of_another_run_is_a_failure(folder, tmp_path):
    config = of_folder(folder, tmp_path)
    save_a_state(config)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(dataclasses.replace(config, seed=1).to_dict()))
    (found,) = failures(config)
    assert "seed: 1 -> 42" in found.found


def test_a_folder_of_unreadable_checkpoints_is_a_failure(folder, tmp_path):
    (tmp_path / "run" / "checkpoints" / "7").mkdir(parents=True)
    (found,) = failures(of_folder(folder, tmp_path))
    assert "No checkpoint in" in found.found
    assert "step 7: " in found.found


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900])
def test_a_damaged_recipe_is_named_and_does_not_stop_the_run(folder, tmp_path, caplog, content):
    config = of_folder(folder, tmp_path)
    save_a_state(config)
    path = tmp_path / "run" / "recipe.json"
    path.write_text(content, encoding="latin-1")
    assert not failures(config)
    assert content in ("{}", '{"a":' * 900 + "1" + "}" * 900) or f"Ignores the damaged {path}" in caplog.text


def in_megabytes(config):
    """What the workers need by the finding about the host's memory."""
    (memory,) = findings(config, "host memory")
    number, unit = re.search(r"need about ([\d.]+) ([MG])B", memory.found).groups()
    return float(number) * {"M": 1, "G": 1000}[unit], memory.found


def test_the_workers_of_an_evaluation_are_counted_beside_the_trainings(folder, tmp_path):
    needed, found = in_megabytes(of_folder(folder, tmp_path, data__workers=2))
    assert found.startswith("2 data workers, and 2 more for evaluations, need about ")
    assert needed >= 4 * 150
    # All images in one batch are one worker's.
    batch = 8008 * 16 * 16 / 1e6
    other, found = in_megabytes(of_folder(folder, tmp_path, data__workers=2, data__evaluation_batch_size=8008))
    assert found.startswith("2 data workers, and 1 more for evaluations, need about ")
    # One worker has 2 + 2 ready, 2 to hand on and 2 in the making, and one is in use; what two had of 8 is nothing.
    assert other - needed == pytest.approx(9 * batch - 150, abs=0.2)


def test_the_workers_batches_are_compared_with_free_shared_memory(folder, tmp_path, monkeypatch):
    changes = {"data__worker_batches": 3, "data__evaluation_batch_size": 8008}
    config = of_folder(folder, tmp_path, data__workers=2, **changes)
    # Eight of each of training's two workers, and one in use; eight and one of evaluations' single worker.
    needed = 17 * 8 * 16 * 16 + 9 * 8008 * 16 * 16
    for free, level in ((needed + 1, "fine"), (needed, "failure")):
        monkeypatch.setattr(resource_checks, "_free_shared_memory", lambda free=free: free)
        (memory,) = findings(config, "shared memory")
        expected = "the workers keep up to 26 batches in /dev/shm, 18.5 MB in all, and 18.5 MB are free there"
        assert (memory.level, memory.found) == (level, expected)
    for remedy in ("--shm-size", "emptyDir with medium: Memory at /dev/shm", "--data.worker-batches 1"):
        assert remedy in memory.remedy
    assert not findings(of_folder(folder, tmp_path, data__workers=0, **changes), "shared memory")
    monkeypatch.setattr(resource_checks, "_free_shared_memory", lambda: None)
    assert not findings(config, "shared memory")


def test_the_memory_of_a_container_is_less_than_the_hosts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "available_memory", lambda: 640e6)
    (found,) = findings(of_folder(folder, tmp_path, data__workers=2), "host memory")
    assert re.search(r"need about 600\.\d MB of the 640\.0 MB available", found.found)
    assert found.level == "failure"


def test_the_source_counts_twice_for_each_worker(folder, tmp_path, monkeypatch):
    """Two workers keep 10 MB of names, pickled and unpickled; so do those of evaluations."""
    config = of_folder(folder, tmp_path, data__workers=2)
    needed, _ = in_megabytes(config)
    counter = {f".{'x' * 1_000_000}{number}": 1 for number in range(10)}
    read = folders.read_class_folders
    monkeypatch.setattr(
        folders, "read_class_folders", lambda *given: dataclasses.replace(read(*given), skipped=counter)
    )
    assert in_megabytes(config)[0] - needed == pytest.approx(4 * 2 * 10, abs=0.2)


def test_a_step_that_the_compiler_refuses_for_its_memory_is_reported(folder, tmp_path, monkeypatch, compiled_step):
    expected = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.03G) ..."
    )

    def refuse(*_):
        raise JaxRuntimeError(f"{expected}\nand many lines about single arrays")

    def make_parts(*given, **named):
        return dataclasses.replace(setup.make_parts(*given, **named), step=SimpleNamespace(lower=refuse))

    monkeypatch.setattr(doctor, "make_parts", make_parts)
    (found,) = failures(of_folder(folder, tmp_path))
    assert (found.subject, found.found) == ("device memory", f"the step does not fit: {expected}")
    assert "--mesh.fsdp" in found.remedy


def test_the_report_fits_the_screen_and_gives_an_exit_code(folder, tmp_path):
    (folder / "train" / "cat" / "3.png").write_bytes(b"not an image")
    shown = []
    assert (
        print_findings(iter(findings(of_folder(folder, tmp_path))), lambda text, style: shown.append(text), width=80)
        == 1
    )
    text = "\n".join(shown)
    assert "1 of these would stop the run" in text
    words = [word for word in text.split() if len(word) > 60]
    assert max(len(line) for line in text.splitlines() if not any(word in line for word in words)) <= 80
    assert print_findings(iter([]), lambda text, style: None, width=80) == 0


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
    (found,) = findings(of_folder(folder, tmp_path, dtype="bfloat16", kernels=mode), "kernels")
    assert found.level == level
    assert "mlp_gradient cannot run: no compiler" in found.found
    assert "--kernels off" in found.remedy
