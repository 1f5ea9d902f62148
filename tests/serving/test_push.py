"""`bigtrain push` and hf://: the hub's own client against a small hub on this machine."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

import bigtrain
from tests.launching import ENVIRONMENT, ROOT

SHA = "1" * 40


@pytest.fixture
def hub():
    """A hub with one repository: its address, and what was uploaded."""
    files = {}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body, status=200, with_body=True, **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self):
            body, address = self.body(), f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                self.answer({"url": f"{address}/{asked.get('organization', 'user')}/{asked['name']}"})
            elif "/preupload/" in self.path:
                named = [each["path"] for each in json.loads(body)["files"]]
                kinds = [
                    {
                        "path": name,
                        "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for name in named
                ]
                self.answer({"files": kinds})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{address}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        files[line["value"]["path"]] = files.pop(f"lfs/{line['value']['oid']}")
                self.answer({"commitUrl": f"{address}/user/name/commit/{SHA}", "commitOid": SHA, "success": True})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            else:
                self.answer({}, 404)

        def do_PUT(self):
            data = self.body()
            files[f"lfs/{hashlib.sha256(data).hexdigest()}"] = data
            self.answer(b"")

        def do_GET(self, with_body=True):
            path = self.path.split("?")[0]
            if path.startswith("/api/models/user/name"):
                siblings = [{"rfilename": name} for name in files]
                body = {"id": "user/name", "sha": SHA, "siblings": siblings}
                if "/tree/" in path:
                    body = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()]
                self.answer(body, with_body=with_body, Content_Type="application/json")
            elif "/resolve/" in path and (name := path.rpartition("/")[2]) in files:
                tag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
                self.answer(files[name], with_body=with_body, ETag=tag, X_Repo_Commit=SHA)
            elif path == "/":
                self.answer({}, with_body=with_body)
            else:
                self.answer({}, 404, with_body=with_body)

        def do_HEAD(self):
            self.do_GET(with_body=False)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()


@pytest.fixture
def ask(hub, tmp_path):
    """ask(code or command words) -> a finished process that knows this hub alone."""
    environment = {**ENVIRONMENT, "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_test"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}

    def run(*words):
        line = [sys.executable, "-m", "bigtrain.cli", *map(str, words)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=110)

    return run


def test_pushed_and_loaded(hub, ask, finished, photos, tmp_path):
    """What is pushed loads from hf:// and scores the same bits; the card has the run's figures as model-index."""
    done = ask("push", "--detector", finished, "--to", "user/name")
    assert done.returncode == 0, done.stderr
    assert "threshold.jpg shows pictures of your data" in done.stdout
    files = hub[1]
    assert set(files) == {"README.md", "detector.json", "student.safetensors", "teacher.safetensors", "threshold.jpg"}
    card = files["README.md"].decode()
    about = yaml.safe_load(card.split("---")[1])
    results = json.loads((finished / "results.json").read_text())
    found = {each["type"]: each["value"] for each in about["model-index"][0]["results"][0]["metrics"]}
    assert found["auroc"] == round(results["auroc"]["value"], 4) and about["library_name"] == "bigtrain"
    assert "hf://user/name" in card and "known classes: ankle_boot" in card and "## Limits" in card
    assert f"{100 * results['auroc']['low']:.1f} to {100 * results['auroc']['high']:.1f}" in card
    line = ["score", "--images", photos / "bag", "--detector", "hf://user/name", "--out", tmp_path / "hub.csv"]
    done = ask(*line)
    assert done.returncode == 0, done.stderr
    scores = np.loadtxt(tmp_path / "hub.csv", delimiter=",", skiprows=1, usecols=1)
    detector = bigtrain.load_detector(finished, device="cpu")
    np.testing.assert_array_equal(scores, detector.score(sorted((photos / "bag").iterdir())))


def test_without_pictures(hub, ask, finished):
    """--without-pictures leaves them out of the folder and of the card."""
    done = ask("push", "--detector", finished, "--to", "user/name", "--without-pictures")
    assert done.returncode == 0, done.stderr
    assert "threshold.jpg" not in hub[1] and b"threshold.jpg" not in hub[1]["README.md"]


def test_changed_on_the_hub(hub, ask, finished, photos, tmp_path):
    """Weights that are not those of the detector are refused by name."""
    assert ask("push", "--detector", finished, "--to", "user/name").returncode == 0
    hub[1]["student.safetensors"] = hub[1]["student.safetensors"][:-4] + b"\0\0\1\0"
    line = ["score", "--images", photos / "bag", "--detector", "hf://user/name", "--out", tmp_path / "s.csv"]
    done = ask(*line)
    assert done.returncode == 2 and "student.safetensors is not the file that was saved with it" in done.stderr


def test_mistakes(ask, saved, finished):
    for words, said in (
        (("push", "--detector", finished, "--to", "../name"), "is no name on the hub: give USER/NAME"),
        (("push", "--detector", saved, "--to", "user/name"), "has no README.md"),
        (("push", "--detector", "nowhere", "--to", "user/name"), "does not exist"),
        (
            ("score", "--detector", "hf://user/other", "--images", ".", "--out", "s.csv"),
            "cannot be downloaded from the hub",
        ),
    ):
        done = ask(*words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_threshold_pictures(finished):
    """The folder shows the pictures around the threshold: four below and four above, 128 pixels each."""
    from PIL import Image

    assert Image.open(finished / "detector" / "threshold.jpg").size == (8 * 128, 128)
    assert (finished / "detector" / "README.md").is_file()
