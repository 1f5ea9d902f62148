"""The cards of a table's saved detectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.evaluation.judge import near_threshold, write_own_card
from bigtrain.evaluation.scored import judged_images
from bigtrain.training.feature_table import Table, folder_of


def write_cards(table: Table, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the card of each row whose detector was saved in `folder`."""
    results = judged_images(table.split, table.seed, len(table.seen.held_out_N), table.seen.skipped)
    has_test = bool(len(table.seen.test_N))
    for name in table.scores:
        place = folder / folder_of(name)
        if not place.is_dir():
            continue
        threshold = (table.figures[name]["threshold"] or {}).get("value")
        near = near_threshold(table.scored(name)[0 if has_test else 1], threshold)
        figures = table.figures[name] if has_test else None
        write_own_card(place, name, results, settings, table.split, figures=figures, near=near)
