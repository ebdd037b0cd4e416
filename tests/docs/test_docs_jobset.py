"""The JobSet of docs/examples: its fields, and what its command does with signals and exit codes.

`jobset_fields.json` has the fields that it uses and their types, from the schema of the custom resource (v1alpha2 in
kubernetes-sigs/jobset, August 2026). The API server drops fields that the schema does not have.
"""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from paths import ROOT

MANIFEST = yaml.safe_load((ROOT / "docs" / "examples" / "jobset.yaml").read_text())
FIELDS = json.loads((Path(__file__).parent / "jobset_fields.json").read_text())
(SLICE,) = MANIFEST["spec"]["replicatedJobs"]
JOB = SLICE["template"]["spec"]
POD = JOB["template"]["spec"]
(CONTAINER,) = POD["containers"]
TYPES = {str: "string", int: "integer"}


def leaves(value, path):
    if isinstance(value, dict):
        for key, below in value.items():
            # A field of the schema, or a key of a map such as nodeSelector.
            name = f"{path}.*" if f"{path}.*" in FIELDS else f"{path}.{key}"
            yield from leaves(below, name)
    elif isinstance(value, list):
        for below in value:
            yield from leaves(below, f"{path}[]")
    else:
        yield path, TYPES[type(value)]


def test_every_field_is_one_of_the_jobsets_schema():
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for path, kind in leaves(MANIFEST["spec"], "spec"):
        assert kind in FIELDS.get(path, "no such field").split(" or "), path


def test_one_pod_runs_on_every_host_of_a_slice():
    chips = math.prod(map(int, POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // CONTAINER["resources"]["limits"]["google.com/tpu"]
    assert JOB["parallelism"] == JOB["completions"] == hosts


def test_a_divergence_and_a_wrong_command_line_end_the_jobset_and_all_else_restarts_it():
    (rule,) = JOB["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}}
    (failure,) = MANIFEST["spec"]["failurePolicy"]["rules"]
    assert (failure["action"], failure["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert MANIFEST["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert POD["restartPolicy"] == "Never"  # Kubernetes demands it for exit codes


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("touch runs/s12/finished.json", 0),
        ("exit 3", 3),
        ("trap 'touch saved; exit 0' TERM; touch started; while :; do sleep 0.01; done", 1),
    ],
    ids=["finished", "diverged", "stopped by SIGTERM"],
)
def test_the_pod_succeeds_only_if_the_run_is_finished(tmp_path, program, expected):
    (tmp_path / "runs" / "s12").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    (shell, option), (script,) = CONTAINER["command"], CONTAINER["args"]
    command = [shell, option, f'PATH="{tmp_path}:$PATH"\n{script.replace("/disk", str(tmp_path))}']
    with subprocess.Popen(command, cwd=tmp_path) as pod:
        if "started" in program:
            deadline = time.monotonic() + 30
            while not (tmp_path / "started").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            pod.send_signal(signal.SIGTERM)
        assert pod.wait(30) == expected
    assert (tmp_path / "saved").exists() == ("saved" in program)
