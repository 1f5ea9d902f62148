"""The shard contract: what a shard set holds, how it is named, and its manifest.

A shard set is a folder, or any fsspec URL prefix (s3://, gs://, http://, hf://), that holds

    000000.tar ...   WebDataset members <key>.<ext>: the image as its original bytes, <key>.json, <key>.mask.png if any
    manifest.json    what the set is, and every shard with its samples, bytes and sha256; written last
    index.parquet    one row a sample, in shard order: where its image lies and which classes it shows

A subset is a set without tars: its manifest says where they lie (`shards_at`), its index holds some of their samples.

`set_files` has the columns of the index and reads both files. Neither knows torch or any dataset, so that `shards` and
`slurm` can build on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = "bigtrain-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.parquet"
MASK_SUFFIX = "mask.png"


def may_be_of(header: bytes, key: str) -> bool:
    """Whether a member's header, the 512 bytes before its own, may be that of a sample by its name.

    Of a long name, or one that is not ASCII, tars differ in what they keep in it: such a one may be any sample's.
    """
    name, prefix = (field.split(b"\0", 1)[0] for field in (header[:100], header[345:500]))
    whole = prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name
    is_plain = len(name) < 100 and len(whole) < 250 and key.isascii() and whole.isascii()
    return not is_plain or whole.startswith(key.encode() + b".")


@dataclass(frozen=True)
class Box:
    """A box in pixels of the original image, half-open: rows top .. bottom - 1, columns left .. right - 1."""

    top: float
    left: float
    bottom: float
    right: float


@dataclass(frozen=True)
class Object:
    """One annotated object; without a box it is a label of the whole image."""

    class_name: str
    box: Box | None = None


@dataclass(frozen=True)
class Sample:
    """What a dataset adapter yields: one image and what is known of it.

    Args:
        key: unique in the set; letters, digits, "_", "-" and "/" (no dot: WebDataset splits key and extension there).
        image: the picture's file, its encoded bytes, or what makes them, in whatever process that is (picklable).
        image_ext: one of images.IMAGE_EXTENSIONS, lower case.
        objects: what it shows; empty where nothing is annotated. A box is cut to the picture when it is packed.
        source: where it came from, relative to the dataset's root.
        mask: a PNG of the defect or segmentation, if there is one.
        annotated_size: width and height of the picture that the boxes were drawn in, where the dataset tells.
    """

    key: str
    image: Path | bytes | Callable[[], bytes]
    image_ext: str
    objects: Sequence[Object] = ()
    source: str = ""
    mask: Path | bytes | None = None
    annotated_size: tuple[int, int] | None = None

    @property
    def classes(self) -> list[str]:
        return sorted({o.class_name for o in self.objects})

    def to_json(self) -> bytes:
        """The member <key>.json, the same bytes for the same sample."""
        boxes = [[o.box.top, o.box.left, o.box.bottom, o.box.right, o.class_name] for o in self.objects if o.box]
        record = {"classes": self.classes, "boxes": boxes, "source": self.source}
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Shard:
    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    dataset: str
    split: str
    classes: tuple[str, ...]  # every class name of the set, in the order the dataset gives them
    licence: str
    shards: tuple[Shard, ...]  # of a subset: `samples` are those it takes, `bytes` and `sha256` are of the whole tar
    shards_at: str = ""  # of a subset: the URL of the folder of the tars, or its path from the manifest's own folder
    folder_order: tuple[str, ...] = ()  # the classes as the owners' numbered folders order them, where names do not
    classes_from: str = ""  # of shards that others made: where `index` took the classes, "members" or "folder"

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> str:
        record = {"format": FORMAT, "version": VERSION, "samples": self.samples, **asdict(self)}
        for name in ("shards_at", "folder_order", "classes_from"):
            if not record[name]:
                del record[name]
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    def checked(self, where: str) -> Manifest:
        """Refuse values of other kinds, and file names that would lead out of the set's own folder."""
        texts = (
            self.dataset,
            self.split,
            self.licence,
            self.shards_at,
            self.classes_from,
            *self.classes,
            *self.folder_order,
        )
        texts += tuple(text for shard in self.shards for text in (shard.file, shard.sha256))
        counts = [count for shard in self.shards for count in (shard.samples, shard.bytes)]
        if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in counts):
            raise TypeError("a text where a number should be, or the other way round")
        if self.folder_order and sorted(self.folder_order) != sorted(self.classes):
            raise ValueError(f"{where} has a folder_order of other classes than its own: build the shards again.")
        for shard in self.shards:
            if shard.file != PurePosixPath(shard.file).name or "\\" in shard.file or shard.file in ("", "..", "."):
                raise ValueError(f"{where} names the shard {shard.file!r}: shards lie beside their manifest.")
        return self

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_FILE) -> Manifest:
        try:
            record: dict[str, Any] = json.loads(text)
            if record["format"] != FORMAT or record["version"] > VERSION:
                raise ValueError(
                    f"{where} is {record['format']} version {record['version']}, and this bigtrain reads {FORMAT} up "
                    f"to version {VERSION}: install a newer bigtrain, or build the shards again."
                )
            return cls(
                dataset=record["dataset"],
                split=record["split"],
                classes=tuple(record["classes"]),
                licence=record["licence"],
                shards=tuple(Shard(**shard) for shard in record["shards"]),
                shards_at=record.get("shards_at", ""),
                folder_order=tuple(record.get("folder_order", ())),
                classes_from=record.get("classes_from", ""),
            ).checked(where)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{where} is not a manifest of a shard set ({type(error).__name__}: {error}): "
                "build the shards again, or make a manifest with `bigtrain-shards index`."
            ) from error
