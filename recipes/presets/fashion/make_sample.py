"""Make the embedded sample of Fashion-MNIST: the first images of each class, in the dataset's own idx form.

    python recipes/presets/fashion/make_sample.py --source /usr/share/datasets/fashion-mnist

The source is the folder with the four *-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist, as Debian's
package dataset-fashion-mnist installs it. "First" means in file order, so that nothing is chosen: of each class the
first 300 training and the first 100 test images, kept in the order of the files. The idx bytes are always the same,
and so are the gzip bytes (mtime 0, no name inside) with the same zlib.
"""

from __future__ import annotations

import argparse
import gzip
import io
import struct
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parent / "sample"
IMAGES_MAGIC = 0x00000803  # unsigned bytes in three dimensions: images, rows, columns
LABELS_MAGIC = 0x00000801  # unsigned bytes in one dimension
PER_CLASS = {"train": 300, "t10k": 100}


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a gzipped idx file of unsigned bytes: images (N, rows, columns) or labels (N,)."""
    content = gzip.decompress(path.read_bytes())
    (magic,) = struct.unpack_from(">I", content)
    if magic not in (IMAGES_MAGIC, LABELS_MAGIC):
        raise ValueError(
            f"{path} starts with {magic:#010x}, not with {IMAGES_MAGIC:#010x} (images) or {LABELS_MAGIC:#010x} "
            "(labels): it is not an idx file of Fashion-MNIST. Fetch it again."
        )
    dimensions = magic & 0xFF
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of unsigned bytes as gzipped idx, without date or name: the same array, the same bytes."""
    magic = 0x00000800 | array.ndim
    header = struct.pack(f">I{array.ndim}I", magic, *array.shape)
    compressed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=compressed, mtime=0) as file:
        file.write(header + array.tobytes())
    path.write_bytes(compressed.getvalue())


def first_of_each_class(label_N: np.ndarray, count: int) -> np.ndarray:
    """Return the positions, ascending, of the first `count` entries of each class."""
    found = [np.flatnonzero(label_N == label) for label in np.unique(label_N)]
    for label, positions in zip(np.unique(label_N), found, strict=True):
        if len(positions) < count:
            raise ValueError(
                f"class {label} has {len(positions)} images where {count} are needed: the source is incomplete"
            )
    return np.sort(np.concatenate([positions[:count] for positions in found]))


def make_sample(source: Path, target: Path) -> None:
    """Write the four files of the sample to `target` from the four of the same names in `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for split, count in PER_CLASS.items():
        images_file, labels_file = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
        label_N = read_idx(source / labels_file)
        kept = first_of_each_class(label_N, count)
        write_idx(target / images_file, read_idx(source / images_file)[kept])
        write_idx(target / labels_file, label_N[kept])


def main() -> None:
    """Read the command line and make the sample."""
    parser = argparse.ArgumentParser(description="Make the embedded sample of Fashion-MNIST.")
    parser.add_argument("--source", type=Path, required=True, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--target", type=Path, default=SAMPLE, help="where the sample goes (default: %(default)s)")
    arguments = parser.parse_args()
    make_sample(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
