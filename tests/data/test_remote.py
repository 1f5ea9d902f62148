"""Shard sets behind nginx and S3, over the wire: the same bytes, whatever the server does, or a clear stop."""

import logging
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from bigtrain.data.schema import Manifest
from bigtrain.data.shard_set import ShardSet
from bigtrain.retry import RetryPolicy
from tests.servers import Fault, use_s3

TOP = Path(__file__).parents[2]
QUICK = RetryPolicy(attempts=6, first_wait_s=0.01, timeout_s=0.5)
SERVERS = ["nginx", "s3"]


@pytest.fixture
def local(write_set):
    """Four shards of ten samples of 3 to 5 kB."""
    rng = np.random.default_rng(0)
    samples = [([f"c{i % 3}"], rng.bytes(int(rng.integers(3000, 5000)))) for i in range(40)]
    return write_set(samples, per_shard=10)


@pytest.fixture
def upload(request, tmp_path):
    """upload("nginx" or "s3", folder) -> its address there."""

    def put(kind, folder):
        if kind == "nginx":
            nginx = request.getfixturevalue("nginx")
            (nginx.folder / tmp_path.name).symlink_to(folder)
            return f"{nginx.url}/{tmp_path.name}"
        s3 = request.getfixturevalue("s3")
        fsspec.filesystem("s3").put(f"{folder}/", f"{s3.url}/set/", recursive=True)
        return f"{s3.url}/set"

    return put


@pytest.fixture
def behind(request, upload, faulty, monkeypatch):
    """behind(kind, folder) -> (address of the set behind a faulty proxy, the proxy)."""

    def put(kind, folder):
        url = upload(kind, folder)
        if kind == "nginx":
            nginx = request.getfixturevalue("nginx")
            proxy = faulty(nginx.url)
            return url.replace(nginx.url, proxy.url), proxy
        s3 = request.getfixturevalue("s3")
        proxy = faulty(s3.endpoint)
        once = {"retries": {"total_max_attempts": 1}}  # boto's own retries would only take longer
        use_s3({**s3.options, "endpoint_url": proxy.url, "config_kwargs": once}, monkeypatch)
        return url, proxy

    return put


@pytest.mark.parametrize("kind", SERVERS)
def test_same_as_local(local, upload, kind):
    """A set behind a server is the same as the set on the disk."""
    far = ShardSet(upload(kind, local.url))
    assert far.manifest == local.manifest
    assert far.keys() == local.keys()
    assert [far.classes_of(s) for s in range(40)] == [local.classes_of(s) for s in range(40)]
    order = np.random.default_rng(1).permutation(40).tolist()
    assert far.read(order) == local.read(order)
    assert far.read([7, 7, 0, 39, 7]) == local.read([7, 7, 0, 39, 7])


@pytest.mark.parametrize("kind", SERVERS)
def test_neighbours_one_request(local, behind, kind):
    """Adjacent samples are read in one request, whatever their order, and so is a whole shard."""
    url, proxy = behind(kind, local.url)
    far = ShardSet(url)
    proxy.asked.clear()
    assert far.read([3, 1, 2, 4]) == local.read([3, 1, 2, 4])
    assert len(proxy.asked) == 1
    proxy.asked.clear()
    far.read(list(range(40)))
    assert len(proxy.asked) == 4  # one a shard


FAULTS = {
    "cut in mid-shard": [Fault(cut_after=2000)] * 3,
    "busy": [Fault(status=503)] * 3,
    "too many requests": [Fault(status=429)] * 3,
    "truncated": [Fault(truncate_to=1000), Fault(truncate_to=0), Fault(truncate_to=2999)],
    "silent": [Fault(is_silent=True)] * 2,
    "slow": [Fault(delay_s=0.1)] * 8,
    "all of them": [
        Fault(status=503),
        Fault(cut_after=0),
        Fault(truncate_to=9),
        Fault(is_silent=True),
        Fault(status=500),
    ],
}


@pytest.mark.parametrize(("kind", "harm"), [*(("nginx", harm) for harm in FAULTS), ("s3", "all of them")])
def test_server_faults(local, behind, kind, harm):
    """Whatever a server does, no sample is lost or doubled."""
    url, proxy = behind(kind, local.url)
    far = ShardSet(url, QUICK)
    proxy.faults = list(FAULTS[harm])
    for first in range(0, 40, 8):
        samples = list(range(first, first + 8))
        assert far.read(samples) == local.read(samples)
    assert not proxy.faults  # each fault was served


def test_retries_logged(local, behind, caplog):
    """Each retry is logged, and the waits between them grow."""
    url, proxy = behind("nginx", local.url)
    far = ShardSet(url, RetryPolicy(attempts=4, first_wait_s=0.01))
    proxy.faults = [Fault(status=503)] * 3
    with caplog.at_level(logging.WARNING, "bigtrain"):
        assert far.read([12]) == local.read([12])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert all(f"{url}/000001.tar: ClientResponseError: 503" in line for line in said)
    assert [line.split("attempt ")[1].split(" in")[0] for line in said] == ["2 of 4", "3 of 4", "4 of 4"]
    waits = [record.args[-1] / 2**n for n, record in enumerate(caplog.records)]
    assert all(0.005 <= wait <= 0.015 for wait in waits)


def test_waits_leave_rng_alone(local, behind):
    """The random waits leave the run's own random numbers alone."""
    import random

    url, proxy = behind("nginx", local.url)
    far = ShardSet(url, QUICK)
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    proxy.faults = [Fault(status=503)]
    far.read([0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize(
    ("fault", "cause"),
    [(Fault(status=503), "503"), (Fault(truncate_to=100), "100 of"), (Fault(is_silent=True), "within")],
)
def test_broken_server(local, behind, kind, fault, cause):
    """A server that stays broken stops the run, with the shard, key, number of attempts and cause."""
    url, proxy = behind(kind, local.url)
    far = ShardSet(url, RetryPolicy(attempts=2, first_wait_s=0.01, timeout_s=0.5))
    proxy.faults = [fault] * 100
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"{url}/000002.tar cannot be read: tried 2 times; last error: .*k25") as stop:
        far.read([25])
    assert cause in str(stop.value) or kind == "s3"  # its client has its own messages
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", SERVERS)
def test_no_byte_ranges(local, behind, kind):
    """A server that does not support byte ranges is reported after a single request."""
    url, proxy = behind(kind, local.url)
    far = ShardSet(url, QUICK)
    proxy.faults = [Fault(ignores_range=True)] * 100
    proxy.asked.clear()
    with pytest.raises(
        OSError, match=r"000000.tar: the server sent \d+ bytes where \d+ were asked for.*no byte ranges"
    ):
        far.read([5])
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("kind", SERVERS)
def test_a_missing_shard_stops_at_once(local, behind, kind):
    url, proxy = behind(kind, local.url)
    far = ShardSet(url)  # with the default retries, which take minutes
    change(url, Path(local.url) / "000001.tar", None)
    proxy.asked.clear()
    with pytest.raises(FileNotFoundError, match=rf"{url}/000001.tar is missing.*k15"):
        far.read([15])
    assert len(proxy.asked) == 1


def test_a_refused_shard_stops_at_once(local, behind):
    url, proxy = behind("nginx", local.url)
    far = ShardSet(url)
    proxy.faults = [Fault(status=403)]
    with pytest.raises(PermissionError, match=r"000000.tar may not be read .*403.* credentials"):
        far.read([0])


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("length", [700, 21_000])
def test_shard_cut_after_opening(local, upload, kind, length):
    """A shard that is cut after the set was opened stops the read at once."""
    far = ShardSet(url := upload(kind, local.url))
    path = Path(local.url) / "000000.tar"
    change(url, path, path.read_bytes()[:length])
    with pytest.raises(OSError, match=rf"000000.tar has {length} bytes, and bytes .* cut or changed .*k5"):
        far.read([5, 6])


def test_changed_bucket(local, upload):
    """A bucket whose shards changed or vanished since the manifest is refused at opening."""
    url = upload("s3", local.url)
    path = Path(local.url) / "000002.tar"
    size = path.stat().st_size
    change(url, path, path.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=rf"000002.tar has {size + 512} bytes, and the manifest says {size}"):
        ShardSet(url)
    change(url, path, None)
    with pytest.raises(ValueError, match=r"000002.tar is missing, and the manifest says"):
        ShardSet(url)


@pytest.mark.parametrize("kind", SERVERS)
def test_faults_at_opening(local, behind, kind):
    """Opening a set tolerates a faulty server, too."""
    url, proxy = behind(kind, local.url)
    proxy.matching = r"manifest\.json|index\.parquet"
    proxy.faults = [Fault(status=503), Fault(cut_after=10), Fault(truncate_to=40), Fault()]
    proxy.faults += [Fault(is_silent=True), Fault(cut_after=99), Fault(truncate_to=2000)]
    assert ShardSet(url, QUICK).keys() == local.keys()
    assert not proxy.faults


@pytest.mark.parametrize("kind", SERVERS)
def test_missing_files_at_opening(local, upload, kind):
    """An index or manifest that is missing or cut at opening is reported in a sentence."""
    url = upload(kind, local.url)
    index = Path(local.url) / "index.parquet"
    change(url, index, index.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{url} has no readable index.parquet .*bigtrain-shards index"):
        ShardSet(url)
    change(url, index, None)
    with pytest.raises(ValueError, match=rf"{url} has no index.parquet.*bigtrain-shards index"):
        ShardSet(url)
    change(url, index.with_name("manifest.json"), None)
    with pytest.raises(ValueError, match=rf"{url} holds no manifest.json"):
        ShardSet(url)


def test_absent_server(tmp_path):
    """The error for an unreachable server names it."""
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/set/manifest.json cannot be read: tried 2 times"):
        ShardSet("http://127.0.0.1:9/set", RetryPolicy(attempts=2, first_wait_s=0.01))


def test_shards_at(local, upload, tmp_path):
    """A view on the disk reads its shards from behind a server."""
    url = upload("nginx", local.url)
    view = tmp_path / "view"
    shutil.copytree(local.url, view, ignore=shutil.ignore_patterns("*.tar"))
    record = Manifest(**{**vars(local.manifest), "shards_at": url})
    (view / "manifest.json").write_text(record.to_json())
    assert ShardSet(str(view)).read([30, 2]) == local.read([30, 2])


class Pictures(torch.utils.data.Dataset):
    """The bytes of each sample, from each reader."""

    def __init__(self, readers, shard_set):
        self.readers, self.place_N = readers, shard_set.places(np.arange(len(shard_set)))

    def __getitem__(self, sample):
        return [reader.read(*(place[[sample]] for place in self.place_N))[0] for reader in self.readers]


def test_worker_connections(local, upload):
    """Workers open connections of their own, though their parent has some open."""
    far = [ShardSet(upload(kind, local.url)) for kind in SERVERS]
    for shard_set in far:
        shard_set.read([0])  # this process has connections open
    pictures = Pictures([shard_set.reader() for shard_set in far], local)
    options = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "forkserver"}
    read = list(torch.utils.data.DataLoader(pictures, sampler=range(40), **options))
    assert read == [[payload, payload] for payload in local.read(range(40))]


def test_bucket_by_environment(local, upload):
    """Subprocesses find the same bucket by the environment."""
    code = "import sys; from bigtrain.data.shard_set import ShardSet; print(len(ShardSet(sys.argv[1]).read([1, 2])[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, upload("s3", local.url)], cwd=TOP, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(len(local.read([2])[0])), done.stderr


def test_bounded_requests(write_set, behind):
    """Consecutive samples of a large shard are read in several bounded, non-overlapping requests."""
    local = write_set([(["a"], bytes([i]) * (3 << 20)) for i in range(6)], per_shard=6)
    url, proxy = behind("nginx", local.url)
    far = ShardSet(url)
    proxy.asked.clear()
    assert far.read(list(range(6))) == local.read(list(range(6)))
    ranges = sorted(tuple(map(int, asked.removeprefix("bytes=").split("-"))) for _, asked in proxy.asked)
    assert len(ranges) == 3
    assert all(last < first for (_, last), (first, _) in pairwise(ranges))


def change(url, path, data):
    """Overwrite or delete a file of the set, on disk (which nginx serves) and in the bucket."""
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    if url.startswith("s3://") and data is None:
        fsspec.filesystem("s3").rm(f"{url}/{path.name}")
    elif url.startswith("s3://"):
        fsspec.filesystem("s3").pipe_file(f"{url}/{path.name}", data)


@pytest.mark.parametrize("kind", SERVERS)
def test_rebuilt_shard(local, upload, kind):
    """A shard built again with pictures of other sizes is not read under the old labels."""
    url = upload(kind, local.url)
    far = ShardSet(url)
    folder = Path(local.url)
    one, other = (folder / f"{n:06d}.tar" for n in (1, 2))
    longest = max(one.stat().st_size, other.stat().st_size)
    change(url, one, other.read_bytes().ljust(longest, b"\0"))
    with pytest.raises(OSError, match=rf"{url}/000001.tar has other pictures than its index says.*k14") as stop:
        far.read([3, 14, 15])
    assert "k3" not in str(stop.value)
