"""The settings of a build; kept in build.json beside its shards, so that it continues with the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shards.adapters.folder import SPLITS
from shards.existing_set import SETTINGS_FILE
from shards.location import Location
from shards.treatment import JPEG_QUALITY, VERIFY, Treatment


@dataclass(frozen=True)
class Settings:
    """Everything that changes the bytes of a build."""

    adapter: str
    root: str
    split: str
    samples_per_shard: int = 1000
    max_side: int | None = None
    name: str | None = None
    licence: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the adapter's own
    quality: int | None = None  # of a re-encoded picture; None: JPEG_QUALITY
    verify: str = VERIFY[0]
    shuffle_seed: int | None = None  # None: the adapter's order

    def __post_init__(self) -> None:
        if self.quality is not None and self.max_side is None:
            raise ValueError(
                "--quality applies only to pictures that --max-side makes smaller: give --max-side too, or leave "
                "--quality out."
            )
        if not 1 <= (self.quality or JPEG_QUALITY) <= 100 or self.verify not in VERIFY:
            raise ValueError(f"--quality is {self.quality} (1 to 100), --verify {self.verify} ({' or '.join(VERIFY)}).")

    @property
    def treatment(self) -> Treatment:
        return Treatment(self.max_side, self.quality or JPEG_QUALITY, self.verify)

    @property
    def record(self) -> dict[str, Any]:
        """The settings after a round trip through JSON."""
        return with_plain_options(json.loads(json.dumps(asdict(self))))


def begun_with(out: Location) -> dict[str, Any]:
    """The settings that a build was begun with, empty where none was."""
    try:
        text = out.read(SETTINGS_FILE)
    except FileNotFoundError:
        return {}
    return with_plain_options(Settings("", "", "").record | json.loads(text))  # one by an older version has fewer


def with_plain_options(record: dict[str, Any]) -> dict[str, Any]:
    """Without options that say nothing, so that a new option of an adapter is no other setting."""
    given = {name: value for name, value in record["options"].items() if value not in (None, False)}
    return record | {"options": given}


def named_by_folder(settings: Settings, out: Location) -> Settings:
    """Class folders in photos/test are the split "test" of "photos", unless the build was begun under other names."""
    root = Path(settings.root)
    if root.name not in SPLITS or not root.parent.name or not root.is_dir() or begun_with(out) == settings.record:
        return settings
    return replace(settings, split=root.name, name=settings.name or root.parent.name)
