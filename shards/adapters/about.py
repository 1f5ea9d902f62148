"""What an adapter says of its dataset before the first sample."""

from __future__ import annotations

from typing import NamedTuple


class About(NamedTuple):
    """
    Args:
        dataset: its name in the manifest.
        classes: every class name, in the dataset's own order.
        licence: in a few words; "unknown" where the owners state none.
        total: how many samples there will be.
        folder_order: the classes in the order of the owners' numbered folders, where that is not the order of names.
    """

    dataset: str
    classes: list[str]
    licence: str
    total: int
    folder_order: tuple[str, ...] = ()
