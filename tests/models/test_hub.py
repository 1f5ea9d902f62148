"""Models of Hugging Face's hub: a small server in its place, and none at all."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network, as_vit
from bigtrain.models.save_as import save_as
from tests.launching import ENVIRONMENT

CODE = """
import sys
from bigtrain.models.load_network import load_network
try:
    print(load_network(sys.argv[1]).described)
except ValueError as error:
    print("error:", error)
"""


@pytest.fixture
def hub(tmp_path):
    """A server that has org/model in its files as the hub has it; its address."""
    torch.manual_seed(0)
    architecture = Architecture("vit_tiny_patch16_224", 32, depth=2)
    network = Network(as_vit(architecture.build(), "auto"), architecture, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_as("timm", network, tmp_path / "served", "# A card")
    files = {file.name: file.read_bytes() for file in (tmp_path / "served").iterdir()}
    sha = "0" * 40

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self, with_body=True):
            path = self.path.split("?")[0]
            body, kind = None, "application/json"
            if path.startswith("/api/models/org/model"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": "org/model", "sha": sha, "siblings": siblings}).encode()
                if "/tree/" in path:
                    found = [
                        {"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()
                    ]
                    body = json.dumps(found).encode()
            elif path.startswith("/org/model/resolve/"):
                body, kind = files.get(path.rpartition("/")[2]), "application/octet-stream"
            elif path == "/":
                body = b"{}"
            self.send_response(404 if body is None else 200)
            if body is not None:
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", sha)
                self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if with_body and body:
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET(with_body=False)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def loaded(name, endpoint, home):
    environment = {**ENVIRONMENT, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CODE, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began


@pytest.mark.parametrize("name", ["hf-hub:org/model", "org/model"])
def test_model_of_the_hub(hub, tmp_path, name):
    """A model of the hub is downloaded once, with its pixels; afterwards its cache serves without a connection."""
    said, _ = loaded(name, hub, tmp_path / "home")
    assert said.startswith("vit_tiny_patch16_224, 30 keys matched") and "mean 0.1 0.2 0.3, std 0.4 0.5 0.6" in said
    again, _ = loaded(name, "http://127.0.0.1:9", tmp_path / "home")
    assert again == said


def test_no_such_model(hub, tmp_path):
    said, _ = loaded("hf-hub:org/other", hub, tmp_path / "home")
    assert "error: org/other cannot be downloaded from the hub" in said and "check its name" in said


@pytest.mark.parametrize("name", ["hf-hub:org/model", "vit_small_patch14_dinov2.lvd142m"])
def test_no_network(tmp_path, name):
    """Without a connection that is said within seconds."""
    said, took_s = loaded(name, "http://127.0.0.1:9", tmp_path / "home")
    assert "error:" in said and "check" in said and took_s < 60  # imports among them
