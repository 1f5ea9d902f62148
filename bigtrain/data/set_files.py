"""The files of a shard set (`schema`): where they lie, the columns of the index, how manifest and index are read."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from urllib.parse import parse_qsl

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bigtrain.data.fetch import fetch_file, files_of
from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest
from bigtrain.retry import DEFAULT, RetryPolicy

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),  # position in manifest["shards"]
        ("image_offset", pa.int64()),  # of the image's own bytes in the tar, behind its header
        ("image_size", pa.int64()),
        ("image_ext", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("classes", pa.list_(pa.string())),  # distinct names, sorted; empty: nothing is annotated
    ]
)
DIGEST = "digest"  # 64 bits of a picture's SHA-256; indexes of earlier versions lack it
WRITTEN_SCHEMA = INDEX_SCHEMA.append(pa.field(DIGEST, pa.uint64()))


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a shard set's folder or URL prefix, and the path in it, without a slash at its end.

    Endpoints and credentials are the business of fsspec and its clients: for S3, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID
    and AWS_SECRET_ACCESS_KEY, or any option of s3fs as FSSPEC_S3_ENDPOINT_URL or in ~/.config/fsspec/*.json.
    """
    if url.startswith("pipe:"):
        raise ValueError(f"{url} would run a shell command, which no address of a shard set may: give a folder or URL.")
    if url.startswith(("http://", "https://")) and "?" in url:  # a signature goes with each file's request
        url, _, query = url.partition("?")
        return fsspec.filesystem("http", params=dict(parse_qsl(query, keep_blank_values=True))), url.rstrip("/")
    fs, path = fsspec.core.url_to_fs(url)
    return fs, path.rstrip("/")


def shards_url(url: str, manifest: Manifest) -> str:
    """The folder or URL prefix where the tars of the set at `url` lie: its own, unless it is a subset."""
    if not manifest.shards_at:
        return url
    if "://" in manifest.shards_at:
        return manifest.shards_at
    folder, mark, query = url.partition("?") if url.startswith("http") else (url, "", "")
    scheme, separator, path = folder.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(path, manifest.shards_at)) + mark + query


def read_manifest(url: str, retry: RetryPolicy = DEFAULT) -> Manifest:
    """Read the manifest of the shard set at `url`; a set without one is an unfinished build or no set at all."""
    fs, path = filesystem(url)
    try:
        text = fetch_file(files_of(fs, retry), f"{path}/{MANIFEST_FILE}", retry).decode(errors="replace")
    except FileNotFoundError as error:
        raise ValueError(
            f"{url} holds no {MANIFEST_FILE}, so it is not a finished shard set: build one from class folders "
            "with `bigtrain-shards build folder --root PICTURES --out SHARDS`, run an interrupted build again, or "
            f"describe shards made elsewhere with `bigtrain-shards index {url}`."
        ) from error
    return Manifest.from_json(text, where=f"{url}/{MANIFEST_FILE}")


def read_index(
    url: str, columns: Sequence[str] = tuple(WRITTEN_SCHEMA.names), retry: RetryPolicy = DEFAULT
) -> pa.Table:
    """Read the index of the shard set at `url`: a table of WRITTEN_SCHEMA, or of some of its columns; without digests
    where it has none."""
    fs, path = filesystem(url)
    advice = f"make it with `bigtrain-shards index {url}`."
    try:
        data = fetch_file(files_of(fs, retry), f"{path}/{INDEX_FILE}", retry)
    except FileNotFoundError as error:
        raise ValueError(f"{url} has no {INDEX_FILE}: {advice}") from error
    try:
        # from memory and in this thread: Arrow's threads on a Python file abort some interpreters at exit (arrow#34314)
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        missing = [name for name in INDEX_SCHEMA.names if name not in file.schema_arrow.names]
        if not missing:
            columns = [name for name in columns if name in file.schema_arrow.names]
            table = file.read(columns, use_threads=False)
            return table.cast(pa.schema([WRITTEN_SCHEMA.field(name) for name in columns]))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{url} has no readable {INDEX_FILE} ({error}): {advice}") from error
    raise ValueError(f"{url}/{INDEX_FILE} lacks the columns {missing}: make it again with `bigtrain-shards index`.")
