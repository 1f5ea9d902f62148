"""`bigtrain serve`: a real server on this machine, asked as clients, pages, load and mischief ask it."""

import base64
import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bigtrain
from bigtrain.runtime.ports import free_port
from tests.launching import ENVIRONMENT, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def serving(detector, *flags):
    """A server as a process; its port and process."""
    line = [sys.executable, "-m", "bigtrain.cli", "serve", "--detector", detector, "--port", 0, *flags]
    process = subprocess.Popen(
        list(map(str, line)), env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    try:
        said = process.stdout.readline()
        assert "serving" in said
        yield int(said.split("//127.0.0.1:")[1].split("/")[0]), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(finished):
    with serving(finished, "--max-mb", 2, "--max-pixels", 1_000_000) as (port, _):
        yield port


def asked(port, body, kind="image/png", path="/v1/score", **headers):
    """Status, JSON and headers of an answer to a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind, **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), answer.headers


def got(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def form(files):
    """A form of (name, bytes), and its kind."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="'
        + name.encode()
        + b'"\r\n\r\n'
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


@pytest.fixture
def files(photos):
    return sorted(photos.rglob("*.png"))[:6]


def test_scores(server, finished, files):
    """One picture as the body, several in a form: the detector's scores, p-values, decisions; the map on request."""
    detector = bigtrain.load_detector(finished, device="cpu")
    expected = detector.judge(files)
    status, answer, headers = asked(server, files[0].read_bytes(), path="/v1/score?map=true")
    (found,) = answer["results"]
    assert status == 200 and found["score"] == pytest.approx(expected[0].score, rel=1e-5)
    assert found["p_value"] == expected[0].p_value and found["novel"] == expected[0].novel
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["map"]["png"]))), float) / 255
    map_hw = found["map"]["low"] + grey * (found["map"]["high"] - found["map"]["low"])
    np.testing.assert_allclose(map_hw, expected[0].map_hw, atol=np.ptp(expected[0].map_hw) / 200)
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, answer, _ = asked(server, *form([(file.name, file.read_bytes()) for file in files]))
    assert status == 200 and [each["name"] for each in answer["results"]] == [file.name for file in files]
    np.testing.assert_allclose([each["score"] for each in answer["results"]], [e.score for e in expected], rtol=1e-5)
    assert "map" not in answer["results"][0]


def test_health_and_metrics(server, files):
    asked(server, files[0].read_bytes())
    status, text, _ = got(server, "/healthz")
    assert status == 200 and json.loads(text)["status"] == "ok"
    status, text, headers = got(server, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    assert 'bigtrain_requests_total{status="200"}' in text and "bigtrain_pictures_waiting 0.0" in text
    status, text, _ = got(server, "/openapi.json")
    assert status == 200 and "/v1/score" in json.loads(text)["paths"]


def test_bad_pictures(server, broken):
    """What is no picture is a 422 with a sentence that names it; too many bytes or pixels say so."""
    for name, payload in broken.items():
        status, answer, _ = asked(server, *form([(name, payload)]))
        assert status == 422 and answer["detail"].startswith(f"{name} cannot be scored: "), answer
    large = io.BytesIO()
    Image.new("L", (1200, 1000)).save(large, "PNG")
    status, answer, _ = asked(server, large.getvalue())
    assert status == 422 and "too many pixels: 1200 x 1000, and at most 1000000" in answer["detail"]
    status, answer, _ = asked(server, b"\0" * 3_000_000)
    assert status == 413 and "more than 2000000 bytes" in answer["detail"]
    chunks = iter([b"\0" * 500_000] * 8)  # no length is told
    status, answer, _ = asked(server, chunks)
    assert status == 413
    for body, kind in (
        (b"", "image/png"),
        (b"--x--\r\n", "multipart/form-data; boundary=x"),
        (b"q", "multipart/form-data"),
    ):
        status, answer, _ = asked(server, body, kind)
        assert status == 422 and isinstance(answer["detail"], str)
    assert asked(server, b"", path="/v1/score?map=perhaps")[0] == 422


def test_names_are_text(server, files):
    """A file name is only ever repeated: it leads to no path, and its control characters are gone from sentences."""
    status, answer, _ = asked(server, *form([("../../etc/passwd", files[0].read_bytes())]))
    assert status == 200 and answer["results"][0]["name"] == "../../etc/passwd"
    status, answer, _ = asked(server, *form([("\x1b[2Jx", b"no")]))
    assert status == 422 and "\x1b" not in answer["detail"]


def test_foreign_host(server):
    """A page of elsewhere whose name leads here gets no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server)
    connection.request("GET", "/healthz", headers={"Host": "attacker.example"})
    assert connection.getresponse().status == 400


def test_full_queue(finished, files):
    """Beyond the queue: 429 with Retry-After; what was accepted is answered."""
    with serving(finished, "--queue", 4, "--max-wait-ms", 300) as (port, _), ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: asked(port, files[0].read_bytes()), range(12)))
    statuses = [status for status, *_ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[2]["Retry-After"]) >= 1 and "ask again later" in refused[1]["detail"]


def test_more_than_the_queue(finished, files):
    """A request that the queue could never take is a 422 that says how many it may have, not one to be asked again."""
    with serving(finished, "--queue", 4) as (port, _):
        status, answer, _ = asked(port, *form([(f"{n}.png", files[0].read_bytes()) for n in range(5)]))
    assert status == 422 and "5 pictures came, and at most 4 are scored at once" in answer["detail"]


def test_deadline(finished, files):
    """A request that takes too long is told so, and later ones are served."""
    with serving(finished, "--deadline-s", 0.2, "--max-wait-ms", 1500) as (port, _):
        status, answer, _ = asked(port, files[0].read_bytes())
        assert status == 503 and "no answer within 0.2 s" in answer["detail"]
        assert json.loads(got(port, "/healthz")[1])["waiting"] == 0


def test_stops_gracefully(finished, files):
    """SIGTERM: no further requests, but what was accepted is answered; then it ends with 0."""
    with serving(finished, "--max-wait-ms", 1500) as (port, process), ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(asked, port, files[0].read_bytes()) for _ in range(8)]
        until = time.monotonic() + 30
        while time.monotonic() < until and json.loads(got(port, "/healthz")[1])["waiting"] < 8:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert [answer.result()[0] for answer in answers] == [200] * 8
        assert process.wait(30) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_batches_of_many(finished, files):
    """Requests at once are scored together, each with its own answer."""
    detector = bigtrain.load_detector(finished, device="cpu")
    expected = dict(zip(files, detector.score(files), strict=True))
    with serving(finished, "--max-wait-ms", 100) as (port, _), ThreadPoolExecutor(24) as pool:
        many = files * 20
        answers = list(pool.map(lambda file: asked(port, file.read_bytes()), many))
        metrics = got(port, "/metrics")[1]
    for file, (status, answer, _) in zip(many, answers, strict=True):
        assert status == 200 and answer["results"][0]["score"] == pytest.approx(expected[file], rel=1e-5)
    mean = float(next(line for line in metrics.splitlines() if line.startswith("bigtrain_batch_pictures")).split()[1])
    assert mean > 3


def test_fuzzed(server, tmp_path):
    """Schemathesis finds no answer of the server's that is an error, or not as the schema says."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    line = [shutil.which("schemathesis", path=str(Path(sys.executable).parent)), "run"]
    line += [f"http://127.0.0.1:{server}/openapi.json", "--checks", checks, "--max-examples", "40", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


MISTAKES = {
    "no detector": (["--detector", "nowhere"], "does not exist"),
    "port in use": (["--port", "TAKEN"], "is in use: give another --port"),
    "no such port": (["--port", "70000"], "lies within 0 and 65535"),
    "queue of 0": (["--queue", "0"], "must be above 0"),
    "negative wait": (["--max-wait-ms", "-1"], "must not be below 0"),
    "rate": (["--threshold", "p=0"], "lies above 0 and below 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, finished, command):
    flags, said = MISTAKES[name]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [str(port) if flag == "TAKEN" else flag for flag in flags]
        line = [] if "--detector" in words else ["--detector", finished]
        line += [] if "--port" in words else ["--port", "0"]
        code, _, error = command("serve", *line, *words)
    assert code == 2 and said in error and error.count("\n") == 1, error


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_page_in_a_browser(server, files, tmp_path):
    """Pictures dropped on the page are shown with score and map; a broken one with the sentence; no console error."""
    websockets = pytest.importorskip("websockets.sync.client")
    port = free_port()
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--remote-debugging-port={port}"]
    line += [f"--user-data-dir={tmp_path}", "about:blank"]
    browser = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                pages = [each for each in json.loads(got(port, "/json")[1]) if each["type"] == "page"]
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.2)
        with websockets.connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as page:
            said = []

            def call(method, **params):
                call.number += 1
                page.send(json.dumps({"id": call.number, "method": method, "params": params}))
                while True:
                    message = json.loads(page.recv(60))
                    if message.get("id") == call.number:
                        return message["result"]
                    said.append(message)

            def value(expression):
                return call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

            def wait(expression):
                until = time.monotonic() + 60
                while not value(expression):
                    assert time.monotonic() < until, expression
                    time.sleep(0.1)

            call.number = 0
            for domain in ("Page", "Runtime", "Log"):
                call(f"{domain}.enable")
            call("Page.navigate", url=f"http://127.0.0.1:{server}/")
            wait("document.readyState === 'complete' && !!document.getElementById('drop')")
            encoded = base64.b64encode(files[0].read_bytes()).decode()
            value(f"""
                const bytes = Uint8Array.from(atob("{encoded}"), (c) => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "<b>one</b>.png", {{type: "image/png"}}));
                data.items.add(new File(["no picture"], "two.png", {{type: "image/png"}}));
                const dropped = new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}});
                document.getElementById("drop").dispatchEvent(dropped);
            """)
            wait("document.getElementById('status').textContent === '2 pictures done'")
            items = value("[...document.querySelectorAll('#results li')].map((item) => item.innerText)")
            assert "two.png cannot be scored: not a picture" in items[0]
            assert "<b>one</b>.png" in items[1] and "score" in items[1] and "\np " in items[1]
            assert value("document.querySelectorAll('#results img.map').length") == 1
            assert value("document.querySelectorAll('#results b').length") == 0
            errors = [each for each in said if each["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
            entries = [each["params"].get("entry", each["params"]) for each in errors]
            # the browser itself notes that an answer was a 422
            assert all("422" in json.dumps(entry) for entry in entries), entries
    finally:
        browser.kill()
        browser.wait()
