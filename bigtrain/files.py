"""Files and folders that appear whole or not at all. One writer for everything, in three strengths:

    "renamed"   whole, whenever the process is killed; may be empty after a power cut
    "synced"    also whole after a power cut, which may bring back the file that was there before
    "durable"   also there after a power cut: its name has been written to the disk too

What is being written is called NAME.HOST-PID.tmp; a process that is killed leaves it behind: `remove_unfinished`
clears a folder that is all ours, `remove_abandoned` only named files among those of others.
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

from bigtrain.text import decoded

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
        return tomllib.loads(decoded(path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"{path} cannot be read ({reason}): {hint}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty, without spaces around; UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ValueError: it is neither.
    """
    try:
        text = decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}): save it as UTF-8.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def write_text(path: Path, text: str, strength: Strength = "synced") -> None:
    with whole_file(path, strength) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, record: Any, strength: Strength = "synced") -> None:
    """Write strict JSON: NaN and infinities are a ValueError."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", strength)


def entries(folder: Path) -> dict[str, int]:
    """The names in a folder and their bytes (a folder, and a link that leads nowhere: 0); empty where there is none.

    One entry that cannot be looked at, a link that leads nowhere, say, hides no other.
    """
    found = {}
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                try:
                    found[entry.name] = 0 if entry.is_dir() else entry.stat().st_size
                except OSError:
                    if entry.is_symlink():
                        found[entry.name] = 0
                    else:
                        with contextlib.suppress(FileNotFoundError):  # renamed or deleted since it was listed
                            found[entry.name] = entry.stat(follow_symlinks=False).st_size
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found


def remove_unfinished(folder: Path, name: str = "*", *, is_shared: bool = False) -> None:
    """Delete what killed writers of `name` (a glob pattern) left behind in a folder of ours.

    Args:
        is_shared: others may be writing here: a file goes if its process on this machine has ended, or after a day.
    """
    for left_over in folder.glob(f"{name}{TEMPORARY}"):
        writer = WRITER.search(left_over.name)
        if writer and not (is_shared and not is_abandoned(left_over, writer)):
            remove(left_over)


def remove_abandoned(folder: Path, *names: str) -> None:
    """Delete what writers of these files left behind that were killed on this machine; nothing else of the folder."""
    ours = re.compile(rf"({'|'.join(map(re.escape, names))})\.{re.escape(socket.gethostname())}-\d+\.tmp")
    for name in entries(folder):
        if ours.fullmatch(name) and (writer := WRITER.search(name)) and is_abandoned(folder / name, writer):
            remove(folder / name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_abandoned(temporary: Path, writer: re.Match[str]) -> bool:
    if temporary.name.endswith(f".{socket.gethostname()}{writer[0]}"):
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
