"""Files and folders that appear whole or not at all. One writer for everything, in three strengths:

    "renamed"   whole, whenever the process is killed; may be empty after a power cut
    "synced"    also whole after a power cut, which may bring back the file that was there before
    "durable"   also there after a power cut: its name has been written to the disk too

What is being written is called NAME.HOST-PID.tmp; a process that is killed leaves it behind (`remove_unfinished`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

Strength = Literal["renamed", "synced", "durable"]
TEMPORARY = ".tmp"
WRITER = re.compile(r"[-.](\d+)\.tmp$")  # NAME.PID.tmp in earlier versions
DAY_S = 86400


def temporary_for(path: Path) -> Path:
    """The name under which this process writes a file or folder."""
    name = os.fsdecode(os.fsencode(path.name)[:150])  # of the 255 bytes that a name may have
    return path.with_name(f"{name}.{socket.gethostname()}-{os.getpid()}{TEMPORARY}")


@contextlib.contextmanager
def whole_file(path: Path, strength: Strength = "synced") -> Iterator[IO[bytes]]:
    """A file to write, and to read back; it gets its name when the block ends without an error, else it is removed."""
    temporary = temporary_for(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            if strength != "renamed":
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if strength == "durable":
        sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path, strength: Strength = "synced") -> Iterator[Path]:
    """A new folder to fill; it takes its name, and the place of an older one, when the block ends without an error."""
    temporary = temporary_for(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inner in [*temporary.rglob("*"), temporary]:
            sync_folder(inner) if inner.is_dir() else sync(inner)
        if path.exists():
            before = temporary_for(path.with_name(f"{path.name}.old"))
            path.rename(before)
            try:
                temporary.rename(path)
            except BaseException:
                before.rename(path)
                raise
            shutil.rmtree(before)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if strength == "durable":
        sync_folder(path.parent)


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """Raises:
    ValueError: it cannot be read, which `hint` says how to mend, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"{path} cannot be read ({reason}): {hint}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty, without spaces around."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_text(path: Path, text: str, strength: Strength = "synced") -> None:
    with whole_file(path, strength) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, record: Any, strength: Strength = "synced") -> None:
    """Write strict JSON: NaN and infinities are a ValueError."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", strength)


def remove_unfinished(folder: Path, name: str = "*", *, is_shared: bool = False) -> None:
    """Delete what killed writers of `name` (a glob pattern) left behind.

    Args:
        is_shared: others may be writing here: a file goes if its process on this machine has ended, or after a day.
    """
    for left_over in folder.glob(f"{name}{TEMPORARY}"):
        writer = WRITER.search(left_over.name)
        if (name == "*" and not writer) or (is_shared and not is_abandoned(left_over, writer)):
            continue
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def is_abandoned(temporary: Path, writer: re.Match[str] | None) -> bool:
    if writer and temporary.name.endswith(f".{socket.gethostname()}{writer[0]}"):
        try:
            os.kill(int(writer[1]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False
    with contextlib.suppress(FileNotFoundError):
        return time.time() - temporary.stat().st_mtime > DAY_S
    return False


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut; some file systems cannot sync a folder, and that is no error."""
    with contextlib.suppress(OSError):
        sync(folder)
