"""Models by name, through the real huggingface_hub, from a Hub that this test serves locally."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

import archives
from golden import published
from paths import ROOT, TESTS
from poolformer_jax import PoolFormerImageProcessor
from poolformer_jax.weights import write_safetensors

pytest.importorskip("huggingface_hub")

FIXTURES = TESTS / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import json, sys
from poolformer_jax import load_pretrained
for name, options in json.loads(sys.argv[1]):
    try:
        model, variables = load_pretrained(name, **options)
        head = variables["params"]["head"]
        result = {"labels": dict(model.config.id2label or {}), "bias": head.get("fc2", head)["bias"].tolist()}
        result["network"] = [model.config.token_mixers[-1], model.config.head_norm_epsilon]
    except (FileNotFoundError, ValueError) as error:
        result = {"error": str(error)}
    print(json.dumps(result))
"""


class Hub:
    """Serves repositories, {name: {file name: path}}, as the Hub does, and records the requests."""

    def __init__(self, repositories):
        self.repositories, self.asked = repositories, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, with_content=True)

            def do_HEAD(self):
                hub.answer(self, with_content=False)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request, with_content):
        owner, name, _, revision, file = request.path.lstrip("/").split("/", 4)
        self.asked.append((revision, file))
        repository = self.repositories.get(f"{owner}/{name}")
        missing = "RepoNotFound" if repository is None else "EntryNotFound" if file not in repository else None
        missing = "RevisionNotFound" if repository and revision not in ("main", "v1") else missing
        if missing:
            request.send_response(404)
            request.send_header("X-Error-Code", missing)
            if missing == "EntryNotFound":
                request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = repository[file].read_bytes()
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if with_content:
            request.wfile.write(content)


def _of_timm(folder, architecture):
    """The files of timm's repository, with a small network of this kind."""
    arrays = published.state_dict("family/timm", f"{architecture.split('_')[0]}_tiny")
    names = [(name, array.shape) for name, array in arrays.items()]
    write_safetensors(folder / "model.safetensors", names, arrays.values(), {"format": "pt"})
    cfg = {"input_size": [3, 384, 384], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    cfg |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classifier": "head.fc.fc2", "num_classes": 10}
    labels = [f"label {index}" for index in range(10)]
    config = {"architecture": architecture, "num_classes": 10, "label_names": labels, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return {path.name: path for path in folder.iterdir()}


def _of_the_authors(folder):
    """Files of the authors' repository, with small networks of these kinds."""
    served = {}
    for variant in ("caformer_s18", "identityformer_s12"):
        kind = variant.split("_")[0]
        arrays = published.state_dict("family/sail", f"{kind}_tiny")
        served[f"{kind}/{variant}.pth"] = archives.checkpoint(folder / f"{kind}.pth", arrays)
    return served


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    index = tmp_path_factory.mktemp("hostile") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.bias": "../../config.json"}}))
    preprocessor = index.with_name("preprocessor_config.json")
    preprocessor.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    sharded = {path.name: path for path in (FIXTURES / "hf_sharded").iterdir()}
    config = FIXTURES / "hf_sharded" / "config.json"
    served = Hub(
        {
            "someone/sharded": {**sharded, "pytorch_model.bin": FIXTURES / "whole_model.bin"},
            "someone/old": {
                "config.json": config,
                "pytorch_model.bin": FIXTURES / "hf.bin",
                "preprocessor_config.json": preprocessor,
            },
            "someone/empty": {"config.json": config},
            "someone/hostile": {"config.json": config, index.name: index},
            "timm/caformer_s18.sail_in22k_ft_in1k": _of_timm(tmp_path_factory.mktemp("timm"), "caformer_s18"),
            "timm/poolformerv2_s12.sail_in1k": _of_timm(tmp_path_factory.mktemp("timm"), "poolformerv2_s12"),
            "sail/dl": _of_the_authors(tmp_path_factory.mktemp("sail")),
        }
    )
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def load(hub, tmp_path):
    """Loads in a new process: huggingface_hub reads its environment when it is imported."""

    def run(*requests, before="", **environment):
        hub.asked.clear()
        arguments = [sys.executable, "-c", before + LOAD, json.dumps(requests)]
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")} | environment
        done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_a_model_is_downloaded_once_safetensors_first_and_then_loaded_offline(hub, load):
    (online,) = load(("someone/sharded", {}))
    assert online["labels"] == {"0": "cat", "1": "dog", "2": "axolotl"}
    files = {file for _, file in hub.asked}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= files
    assert "pytorch_model.bin" not in files
    assert load(("someone/sharded", {}), HF_HUB_OFFLINE="1") == [online]
    assert not hub.asked


def test_an_old_repository_of_pickles_and_a_revision_are_found(hub, load, tmp_path):
    cache = {"revision": "v1", "cache_dir": str(tmp_path / "cache")}
    loaded, again = load(("someone/old", cache), ("someone/old", cache | {"local_files_only": True}))
    assert len(loaded["bias"]) == 3
    assert again == loaded
    assert {revision for revision, _ in hub.asked} <= {"v1", COMMIT}
    # Its preprocessing is in the cache too, for a classifier offline.
    offline = cache | {"local_files_only": True}
    assert PoolFormerImageProcessor.from_pretrained("someone/old", **offline).image_mean == (0.5, 0.5, 0.5)
    assert (tmp_path / "cache" / "models--someone--old" / "refs" / "v1").is_file()


def test_the_second_papers_weights_are_found_at_timm_and_in_the_authors_repository(hub, load, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    names = ("timm/caformer_s18.sail_in22k_ft_in1k", "timm/poolformerv2_s12.sail_in1k")
    files = ("sail/dl/caformer/caformer_s18.pth", "sail/dl/identityformer/identityformer_s12.pth")
    offline = cache | {"local_files_only": True}
    requests = [(name, cache) for name in (*names, *files, "sail/dl/caformer/caformer_s99.pth")]
    *loaded, missing, again = load(*requests, (files[0], offline))
    assert [one["network"] for one in loaded] == [
        ["attention", 1e-6],
        ["pooling", 1e-5],
        ["attention", 1e-5],
        ["identity", 1e-5],
    ]
    assert [len(one["bias"]) for one in loaded] == [10] * 4
    assert loaded[0]["labels"]["9"] == "label 9"
    assert PoolFormerImageProcessor.from_pretrained(names[0], **offline).crop_size == {"height": 384, "width": 384}
    assert again == loaded[2]
    assert missing["error"].startswith("sail/dl on the Hugging Face Hub has no caformer/caformer_s99.pth. Expected")


def test_missing_repositories_revisions_and_weights_are_reported(load):
    requests = (("someone/nothing", {}), ("someone/old", {"revision": "v9"}), ("someone/empty", {}))
    messages = [answer["error"] for answer in load(*requests)]
    assert messages[0].startswith("There is no someone/nothing on the Hugging Face Hub, and no file or folder")
    assert messages[1].startswith("There is no revision 'v9' of someone/old")
    assert messages[2].startswith("someone/empty on the Hugging Face Hub has no weights. Expected one of model.sa")


def test_a_hostile_index_on_the_hub_is_refused(hub, load):
    (answer,) = load(("someone/hostile", {}))
    assert answer["error"].startswith("Cannot read the weights in ")
    assert "expected the name of a file beside it" in answer["error"]
    assert {file for _, file in hub.asked} == {"config.json", "model.safetensors", "model.safetensors.index.json"}


@pytest.mark.slow
def test_an_unreachable_hub_is_reported(load):
    # huggingface_hub tries again after pauses of half a minute in all.
    without_pauses = "import time; time.sleep = lambda seconds: None"
    (answer,) = load(("someone/old", {}), before=without_pauses, HF_ENDPOINT="http://127.0.0.1:9")
    assert "not in the Hub's cache. The Hub was not asked or cannot be reached" in answer["error"]
