"""`bigtrain push`: a detector's folder to Hugging Face's hub, from where `hf://user/name` loads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bigtrain.detectors import DETECTOR_FILE, detector_folder
from bigtrain.detectors.record import check_files, read_record
from bigtrain.evaluation.report.model_card import CARD_FILE, NEAR_FILE

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Options:
    """Of the command; see its help."""

    detector: str
    to: str
    private: bool
    without_pictures: bool


def push(options: Options) -> int:
    """Upload detector.json, the weights, the card and, unless asked not to, the pictures around the threshold.

    Raises:
        ValueError: a mistake in the command, or the hub refuses it.
    """
    if not NAME.fullmatch(options.to):
        raise ValueError(f"--to {options.to!r} is no name on the hub: give USER/NAME.")
    folder = detector_folder(options.detector)
    record = read_record(folder)
    check_files(folder, record)
    if not (folder / CARD_FILE).is_file():
        raise ValueError(f"{folder} has no {CARD_FILE}: it is of an earlier version; judge the run again to write one.")
    files = [DETECTOR_FILE, CARD_FILE, *record.get("files", {})]
    if (folder / NEAR_FILE).is_file() and not options.without_pictures:
        files.append(NEAR_FILE)
        print(f"{NEAR_FILE} shows pictures of your data; --without-pictures leaves it out", flush=True)
    address = uploaded(folder, files, options)
    print(f'{address}; load it with bigtrain.load_detector("hf://{options.to}")', flush=True)
    return 0


def uploaded(folder: Path, files: list[str], options: Options) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    text = (folder / CARD_FILE).read_text(encoding="utf-8").replace("hf://USER/NAME", f"hf://{options.to}")
    if options.without_pictures:
        text = "\n".join(line for line in text.splitlines() if NEAR_FILE not in line) + "\n"
    content = {name: text.encode() if name == CARD_FILE else str(folder / name) for name in files}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=its) for name, its in content.items()]
    try:
        api = HfApi()
        address = api.create_repo(options.to, private=options.private or None, exist_ok=True)
        api.create_commit(options.to, operations, commit_message="A detector of bigtrain")
    except Exception as error:  # the hub's client and the network have errors of their own
        said = str(error).strip().splitlines()
        raise ValueError(
            f"the hub refuses --to {options.to} ({said[0] if said else type(error).__name__}): log in with `hf auth "
            "login`, and check the name."
        ) from error
    return str(address)
