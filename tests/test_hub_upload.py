"""Files are uploaded by the real huggingface_hub to a Hub that this test serves locally."""

import base64
import hashlib
import http.server
import json
import re
import threading

import pytest

from poolformer_jax import (
    FlaxPoolFormerForImageClassification,
    PoolFormerImageProcessor,
    load_pretrained,
)
from poolformer_jax.hub import push_to_hub
from saved_models import CONFIG, PROCESSOR, same

pytest.importorskip("huggingface_hub")
# huggingface_hub's way of handing a large file to httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stores commits, {(repository, branch): {file: content}}. Safetensors files come as large files, others inline."""

    def __init__(self):
        self.files, self.private, self.large, self.commits, self.tokens = {}, {}, {}, [], set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                hub.tokens.add(self.headers.get("Authorization"))
                self.answer(*hub.post(self.path, self.body()))

            def do_PUT(self):
                hub.large[self.path.rsplit("/", 1)[1]] = self.body()
                self.answer(200, {})

            def do_HEAD(self):
                owner, name, _, branch, file = self.path.lstrip("/").split("/", 4)
                found = file in hub.files.get((f"{owner}/{name}", branch), {})
                self.answer(200 if found else 404, {}, **({} if found else {"X-Error-Code": "EntryNotFound"}))

            def body(self):
                if length := self.headers.get("Content-Length"):
                    return self.rfile.read(int(length))
                chunks = b""
                while size := int(self.rfile.readline(), 16):  # a chunked request
                    chunks += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return chunks

            def answer(self, status, content, **headers):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", '"0"')
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def post(self, path, body):
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization'] or 'me'}/{request['name']}"
            if (name, "main") in self.files:
                return 409, {"url": f"{self.url}/{name}"}
            self.files[name, "main"], self.private[name] = {}, request.get("visibility") == "private"
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            action = {item["oid"]: {"upload": {"href": f"{self.url}/large/{item['oid']}"}} for item in objects}
            return 200, {"transfer": "basic", "objects": [item | {"actions": action[item["oid"]]} for item in objects]}
        name, verb, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^?]+)(?:\?.*)?", path).groups()
        if verb == "branch":
            self.files[name, branch] = dict(self.files[name, "main"])
            return 200, {}
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in paths}
            return 200, {"files": [{"path": file, "uploadMode": modes[file], "shouldIgnore": False} for file in paths]}
        assert verb == "commit"
        header, *operations = map(json.loads, body.splitlines())
        for operation in operations:
            value = operation["value"]
            large = operation["key"] == "lfsFile"
            content = self.large[value["oid"]] if large else base64.b64decode(value["content"])
            assert not large or hashlib.sha256(content).hexdigest() == value["oid"]
            self.files[name, branch][value["path"]] = content
        self.commits.append((name, branch, header["value"]["summary"], "create_pr=1" in path))
        pull_request = f"{self.url}/{name}/discussions/1"
        return 200, {
            "commitUrl": f"{self.url}/{name}/commit/{COMMIT}",
            "commitOid": COMMIT,
            "pullRequestUrl": pull_request,
        }


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    served = Hub()
    # As HF_ENDPOINT, which is read when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    served.server.shutdown()
    served.server.server_close()


def save(folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(f"---\ntags:\n- a\n---\n# {folder.name}")


def test_a_push_creates_the_repository_and_commits_every_file(hub):
    url = push_to_hub("someone/new", save, private=True, token="hf_secret", commit_message="First")
    assert url == f"{hub.url}/someone/new/commit/{COMMIT}"
    files = hub.files["someone/new", "main"]
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    assert files["model.safetensors"] == b"weights"
    assert files["README.md"].endswith(b"# new")
    assert hub.private == {"someone/new": True}
    assert hub.commits == [("someone/new", "main", "First", False)]
    assert "Bearer hf_secret" in hub.tokens


def test_a_push_keeps_the_readme_of_an_existing_repository(hub):
    hub.files["me/model", "main"] = {"README.md": b"theirs", "config.json": b"old"}
    push_to_hub("me/model", save, token="hf_secret")
    assert hub.files["me/model", "main"]["README.md"] == b"theirs"
    assert hub.files["me/model", "main"]["config.json"] == b"{}"


@pytest.mark.parametrize(
    ("settings", "file"),
    [(PoolFormerImageProcessor.for_variant("m36"), "preprocessor_config.json"), (CONFIG, "config.json")],
)
def test_settings_are_saved_and_pushed_as_their_file(hub, tmp_path, settings, file):
    settings.save_pretrained(tmp_path / "mine", push_to_hub=True, token="hf_secret")
    assert type(settings).from_pretrained(tmp_path / "mine") == settings
    ((name, content),) = hub.files["me/mine", "main"].items()
    assert name == file
    assert type(settings).from_dict(json.loads(content)) == settings


def test_a_push_goes_to_a_branch_or_into_a_pull_request(hub):
    push_to_hub("model", save, token="hf_secret", revision="dev")
    assert hub.files["me/model", "main"] == {}
    assert "config.json" in hub.files["me/model", "dev"]
    url = push_to_hub("me/model", save, token="hf_secret", create_pr=True)
    assert url == f"{hub.url}/me/model/discussions/1"
    assert hub.commits[-1] == ("me/model", "main", "Upload with poolformer_jax", True)


def test_a_pushed_model_is_loaded_from_the_files_on_the_hub(hub, tmp_path):
    model = FlaxPoolFormerForImageClassification(CONFIG)
    url = model.push_to_hub("someone/model", token="hf_secret", image_processor=PROCESSOR, metrics={"top-1": 0.75})
    assert url == f"{hub.url}/someone/model/commit/{COMMIT}"
    files = hub.files["someone/model", "main"]
    assert set(files) == {"flax_model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert b"| top-1 | 0.75 |" in files["README.md"]
    loaded, variables = load_pretrained(tmp_path)
    assert loaded.config == CONFIG
    assert same(variables["params"], model.params)
    assert PoolFormerImageProcessor.from_pretrained(tmp_path) == PROCESSOR
