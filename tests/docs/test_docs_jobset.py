"""The JobSet in docs/examples fits the slices that it asks for."""

import yaml

from paths import ROOT

PATH = ROOT / "docs" / "examples" / "jobset.yaml"


def test_every_host_of_a_slice_has_one_pod_with_all_its_chips():
    (job,) = yaml.safe_load(PATH.read_text())["spec"]["replicatedJobs"]
    hosts, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    width, height = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert hosts["parallelism"] == hosts["completions"] == width * height // chips
    assert pod["restartPolicy"] == "Never" and hosts["backoffLimit"] == 0
