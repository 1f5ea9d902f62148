"""Pictures behind addresses: the private network is refused by name, number and redirection, unless allowed."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bigtrain.images import UnreadableError
from bigtrain.serving import addresses
from bigtrain.serving.addresses import PrivateAddressError, fetched, public_place
from bigtrain.serving.table_files import read_table


@pytest.fixture
def server(photos):
    """A server of one picture: /a.png; /far leads to another host, /near to the picture; its port."""
    payload = next(photos.rglob("*.png")).read_bytes()

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            leads = {"/far": "http://far.test:1/a.png", "/near": "/a.png"}.get(self.path)
            self.send_response(302 if leads else 200 if self.path == "/a.png" else 404)
            if leads:
                self.send_header("Location", leads)
            self.end_headers()
            self.wfile.write(payload if self.path == "/a.png" else b"")

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served.server_port, payload
    served.shutdown()


PRIVATE = ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_hosts(host):
    with pytest.raises(PrivateAddressError, match=r"in a private network, which is not asked: --allow-private"):
        public_place(host, 80)


def test_allowed(server, finished, tmp_path, command):
    """With --allow-private a picture behind an address of this machine is scored as its bytes are."""
    port, payload = server
    address = f"http://127.0.0.1:{port}/a.png"
    assert fetched(address, may_be_private=True) == fetched(address[:-5] + "near", may_be_private=True) == payload
    line = ["score", "--detector", finished, "--images", address, "--out", tmp_path / "s.jsonl"]
    assert command(*line)[0] == 2 and not (tmp_path / "s.jsonl").exists()
    assert command(*line, "--allow-private")[0] == 0
    (row,) = read_table(tmp_path / "s.jsonl")
    assert row["path"] == address and row["score"] > 0


def test_redirected(server, monkeypatch):
    """A public address that leads to a private one is refused there: each connection is checked, by its number."""
    port, payload = server

    def place(host, number, **_):
        if host != "start.test":
            raise PrivateAddressError(f"{host} is private")
        return ("127.0.0.1", number)

    monkeypatch.setattr(addresses, "public_place", place)
    assert fetched(f"http://start.test:{port}/near") == payload
    with pytest.raises(UnreadableError, match=r"far\.test is private"):
        fetched(f"http://start.test:{port}/far")


def test_no_picture(server):
    """What does not come says why."""
    port, _ = server
    for address, why in (
        (f"http://127.0.0.1:{port}/none.png", "HTTP Error 404"),
        ("http://127.0.0.1:1/a.png", "no picture came"),
        ("http://[x/a.png", "no picture came: ValueError"),
        ("file:///etc/passwd", "begins with http"),
        ("ftp://host/a.png", "begins with http"),
    ):
        with pytest.raises(UnreadableError, match=why):
            fetched(address, may_be_private=True)
    with pytest.raises(UnreadableError, match="more than 10 bytes came"):
        fetched(f"http://127.0.0.1:{port}/a.png", may_be_private=True, max_bytes=10)
