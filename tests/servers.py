"""Real servers on this machine's loopback: nginx, an S3 server, and a proxy before either that does harm by plan."""

import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import fsspec
import pytest

Nginx = namedtuple("Nginx", "url folder")  # what lies in `folder` is served at `url`
S3 = namedtuple(
    "S3", "url endpoint options"
)  # a bucket of its own; the options are those of fsspec.filesystem("s3", ...)

NGINX_CONFIG = """
daemon off; pid {top}/pid; error_log stderr; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; default_type application/octet-stream;
  client_body_temp_path {top}/body; proxy_temp_path {top}/proxy; fastcgi_temp_path {top}/fastcgi;
  uwsgi_temp_path {top}/uwsgi; scgi_temp_path {top}/scgi;
  server {{ listen 127.0.0.1:{port}; root {top}/www; }}
}}
"""


@pytest.fixture(scope="session")
def nginx(tmp_path_factory):
    """An nginx that serves `nginx.folder` at `nginx.url`, with byte ranges."""
    if nginx_program() is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    top = tmp_path_factory.mktemp("nginx")
    (top / "www").mkdir()
    with start_nginx(top) as url:
        yield Nginx(url, top / "www")


def nginx_program():
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextmanager
def start_nginx(top):
    """Serve top/www until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (top / "nginx.conf").write_text(NGINX_CONFIG.format(top=top, port=port))
    # one process, so that it runs as who runs the tests, and ends with a signal
    command = [nginx_program(), "-p", top, "-c", top / "nginx.conf", "-e", "stderr", "-g", "master_process off;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(200):
            if process.poll() is not None:
                raise RuntimeError(f"nginx does not start: {process.stderr.read()}")
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="session")
def s3_server():
    """The endpoint of an S3 server in a thread."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    with start_s3() as endpoint:
        yield endpoint


@contextmanager
def start_s3():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, request):
    """A bucket that every s3:// address of this test reaches, in this process, its workers and its subprocesses."""
    options = {"endpoint_url": s3_server, "key": "key", "secret": "secret"}
    use_s3(options, monkeypatch)
    bucket = "b-" + re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    fs = fsspec.filesystem("s3")
    fs.mkdir(bucket)
    yield S3(f"s3://{bucket}", s3_server, options)
    fs.rm(bucket, recursive=True)


def use_s3(options, monkeypatch):
    """Send s3:// addresses to an endpoint: fsspec's settings reach workers with the file system, variables children."""
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@dataclass
class Fault:
    """What to do to an answer: one of these, or a delay with any.

    Args:
        status: answer so instead.
        cut_after: close the connection after so many bytes of the body.
        truncate_to: send so many bytes of the body, and say that they are all.
        ignores_range: ask the server for the whole file.
        delay_s: wait first.
        is_silent: never answer.
    """

    status: int | None = None
    cut_after: int | None = None
    truncate_to: int | None = None
    ignores_range: bool = False
    delay_s: float = 0
    is_silent: bool = False


class Proxy:
    """Forwards what it is asked to a server, and injects faults.

    `faults` are spent on the answers to GET one by one, in the order given, and only on paths that `matching` finds.
    `asked` notes the path and range of every GET.
    """

    def __init__(self, upstream):
        self.faults, self.matching, self.asked = [], r"\.tar", []
        self.is_over = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self, "upstream": urlsplit(upstream).netloc})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def next_fault(self, path, range_asked):
        with self._lock:
            self.asked.append((path, range_asked))
            return self.faults.pop(0) if self.faults and re.search(self.matching, path) else Fault()

    def close(self):
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: str

    def log_message(self, *_):
        pass

    def do_GET(self):
        is_get = self.command == "GET"
        fault = self.proxy.next_fault(self.path, self.headers["Range"]) if is_get else Fault()
        if fault.is_silent:
            self.proxy.is_over.wait()
            self.close_connection = True
            return
        self.proxy.is_over.wait(fault.delay_s)
        if fault.status:
            self.send_response(fault.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status, headers, body = self._forwarded(fault)
        if fault.truncate_to is not None:
            body = body[: fault.truncate_to]
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = {n.lower(): v for n, v in headers}.get("content-length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: fault.cut_after])
        if fault.cut_after is not None:
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forwarded(self, fault):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name != "Range" or not fault.ignores_range}
        server = HTTPConnection(self.upstream)
        try:
            server.request(self.command, self.path, body=body, headers={**headers, "Connection": "close"})
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            server.close()


@pytest.fixture
def faulty():
    """faulty(address of a server) -> Proxy before it."""
    proxies = []

    def start(upstream):
        proxies.append(Proxy(upstream))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()
