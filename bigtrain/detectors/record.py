"""A detector's folder: where it lies, what detector.json says, and that its files are those that were saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from bigtrain.detectors import DETECTOR_FILE

VERSION = 2  # of detector.json; 1 had no calibration and no hashes
ABOUT = ("method", "version", "calibration", "files", "bigtrain", "pictures", "origin")  # beside the scoring

S = TypeVar("S")


def read_record(folder: Path) -> dict[str, Any]:
    """What detector.json says.

    Raises:
        ValueError: there is none, it is torn, or it is of a newer version.
    """
    file = folder / DETECTOR_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder} holds no {DETECTOR_FILE}: give the folder `detector` of a finished run.") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON, so it was cut or changed: copy the detector again.") from error
    version = record.get("version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is no record of a detector: give the folder `detector` of a finished run.")
    if not isinstance(record.get("method"), str) or not isinstance(record.get("files", {}), dict):
        raise ValueError(f"{file} is no record of a detector: give the folder `detector` of a finished run.")
    if version > VERSION:
        raise ValueError(
            f"{file} is of version {version}, and this bigtrain reads versions up to {VERSION}: install a newer one."
        )
    return record


def check_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder whose files are not those that were saved.

    Raises:
        ValueError: one is missing, cut or changed; it is named.
    """
    if "files" not in record and record["version"] > 1:
        raise ValueError(f"{folder / DETECTOR_FILE} lacks the hashes of its files, so it was changed: copy it again.")
    for name, expected in record.get("files", {}).items():
        file = folder / name
        if Path(name).name != name:
            raise ValueError(
                f"{folder / DETECTOR_FILE} names the file {name!r}, which is not beside it: copy it again."
            )
        if not file.is_file():
            raise ValueError(f"{file} is missing, so the detector was copied in part: copy it again.")
        if sha256_of(file) != expected:
            raise ValueError(f"{file} is not the file that was saved with it, by its SHA-256: copy the detector again.")


def sha256_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_scoring(kind: type[S], record: Mapping[str, Any], where: Path, without: Sequence[str] = ()) -> S:
    """How a detector scores, by its record; one with a setting that is not known, or without one, is refused."""
    said = {key: value for key, value in record.items() if key not in (*ABOUT, *without)}
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    needed = {field.name for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    for what, names in (("has the setting", said.keys() - known), ("lacks the setting", needed - said.keys())):
        if names:
            raise ValueError(
                f"{where / DETECTOR_FILE} {what} {', '.join(sorted(names))}, so another version of bigtrain wrote it: "
                "use that one."
            )
    return kind(**said)
