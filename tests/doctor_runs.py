"""Recipes that the doctor examines, and what it finds."""

from train.commands.doctor import examine
from training import sharded, tiny


def of_folder(folder, tmp_path, **changes):
    """The recipe of a tiny run on these images, with `changes` as `tiny` takes them."""
    data = {"data__source": f"folder:{folder}", "data__batch_size": 8}
    return tiny(**{"run_dir": tmp_path / "run", "mesh": sharded(8, 1), **data, **changes})


def findings(config, subject=None):
    return [finding for finding in examine(config) if subject in (None, finding.subject)]


def failures(config):
    return [finding for finding in findings(config) if finding.level == "failure"]
