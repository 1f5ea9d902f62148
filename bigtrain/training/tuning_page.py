"""What tuning has changed, for people: a page with figures and pictures of patches, and a card beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bigtrain.data.decode import Picture
from bigtrain.data.views import Resized
from bigtrain.evaluation.report.charts import curve_chart
from bigtrain.evaluation.report.overlays import overlay, picture_fields, scale_of
from bigtrain.evaluation.report.page import Group, Section, Strip, write_page
from bigtrain.evaluation.report.report import flattened
from bigtrain.images import UnreadableError
from bigtrain.models.network import Network
from bigtrain.runtime.settings import result_settings
from bigtrain.training.patch_pictures import (
    Seen,
    around_patch,
    as_pictures,
    component_pictures,
    nearest_patches,
    seen_by,
    telling_patch,
)
from bigtrain.training.read_unlabelled import Unlabelled

SHOWN, AMONG, QUERIES, NEAREST = 6, 48, 4, 5  # pictures shown, pictures searched, patches looked for, found for each
SHARES = {
    "pair_agreement": "find their other view", "knn": "kNN accuracy", "linear_probe": "linear probe accuracy",
}  # fmt: skip
NUMBERS = {
    "rank": "effective rank of the features", "token_rank": "effective rank of the patch tokens",
    "spread": "spread (mean ln of the distance to the nearest other)", "prototype_usage": "prototypes in use",
}  # fmt: skip


def figure_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[str]]:
    """A row for each figure: its name, before, after; shares in percent with their 95 % intervals."""

    def share(row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{100 * row[name]['value']:.1f} ({100 * row[name]['low']:.1f} to {100 * row[name]['high']:.1f})"

    rows = [[f"{words}, %", share(before, name), share(after, name)] for name, words in SHARES.items() if name in after]
    for name, words in NUMBERS.items():
        if name in after:
            values = (row.get(name) for row in (before, after))
            rows.append([words, *("" if value is None else f"{value:.3g}" for value in values)])
    return rows


class Shown:
    """The held-out pictures that the page shows, and what a network sees in them before and after tuning."""

    def __init__(self, images: Unlabelled, image_size: int, given: Network, tuned: Network) -> None:
        count = min(AMONG, len(images.held_out_N))
        chosen_N = images.held_out_N[np.linspace(0, len(images.held_out_N) - 1, count).astype(int)]
        view, rng = Resized(image_size), np.random.default_rng(0)
        read: dict[int, torch.Tensor] = {}
        for sample, payload in zip(chosen_N.tolist(), images.train.read(chosen_N.tolist()), strict=True):
            with suppress(UnreadableError):  # the guard's looks have counted it
                read[sample] = torch.from_numpy(view(Picture(payload), rng)["image"])
        images_P3HW = torch.stack(list(read.values()))
        self.pictures = as_pictures(images_P3HW)
        self.names = [(images.train.key(sample), images.train.classes_of(sample)) for sample in read]
        self.seen = {"before": seen_by(given, images_P3HW), "after": seen_by(tuned, images_P3HW)}
        self.first = list(range(min(SHOWN, len(self.pictures))))

    def strip(self, label: str, shown: Sequence[Image.Image], of: Sequence[int], notes: Sequence[str] = ()) -> Strip:
        """Pictures beside each other, each of one of the pictures, with its name."""
        cards = [
            picture_fields(image, *self.names[place]) | {"kind": "", "value": note}
            for image, place, note in zip(shown, of, notes or [""] * len(of), strict=True)
        ]
        return Strip(label, cards)

    def as_strips(self, drawn: Callable[[Seen], Sequence[Image.Image]]) -> list[Group]:
        """The first pictures, and what is drawn of what each network sees in them."""
        first = self.first
        strips = [self.strip("pictures", [self.pictures[place] for place in first], first)]
        for when, seen in self.seen.items():
            part = Seen(seen.tokens_PND[first], seen.attention_PN[first], seen.grid)
            strips.append(self.strip(when, drawn(part), first))
        return [Group("", strips)]

    def attention(self, seen: Seen) -> list[Image.Image]:
        maps = [attention_N.reshape(seen.grid) for attention_N in seen.attention_PN]
        scale = scale_of(maps)
        shown = (self.pictures[place] for place in self.first)
        return [overlay(picture, each, scale) for picture, each in zip(shown, maps, strict=True)]

    def nearest(self) -> list[Group]:
        """For the most attended patch of each of the first pictures, the nearest patches of others."""
        groups, grid = [], self.seen["before"].grid
        for place in self.first[:QUERIES]:
            patch = telling_patch(self.seen["before"], place)
            strips = [self.strip("looked for", [around_patch(self.pictures[place], grid, patch)], [place])]
            for when, seen in self.seen.items():
                found = nearest_patches(seen, place, patch, NEAREST)
                parts = [around_patch(self.pictures[other], grid, at) for other, at, _ in found]
                notes = [f"cosine {cosine:.2f}" for *_, cosine in found]
                strips.append(self.strip(f"nearest, {when}", parts, [other for other, *_ in found], notes))
            groups.append(Group(self.names[place][0], strips))
        return groups


def write_page_of(
    path: Path, config: Any, images: Unlabelled, given: Network, tuned: Network, record: Mapping[str, Any]
) -> None:
    """Write report.html: figures before and after, their course, and what patches look like to both networks."""
    shown, guide = Shown(images, config.image_size, given, tuned), given.vit.guide
    before, after = record["before"], record["after"]
    lead = [
        f"{record['network']}, tuned without labels on {images}. Figures are of {after['images']} held-out pictures; "
        f"the state of step {after['step']} is kept."
    ]
    if record["stopped"]:
        lead.append(f"Tuning was stopped, because {record['stopped']}: what is kept is the best state before.")
    curves = {
        words: np.array([[row["step"], row[name]["value"]] for row in record["looks"]])
        for name, words in SHARES.items()
        if name in before
    }
    components = (
        "The first three principal components of all shown patches as red, green and blue, for each network its own: "
        "patches of one colour are alike."
    )
    near = (
        f"Of the patch that {guide} looks at most, the nearest patch of other pictures, with the patches around it; "
        f"among {len(shown.pictures)} pictures."
    )
    course = curve_chart(curves, x_label="step")
    sections = [
        Section("Before and after", headings=["figure", "before", "after"], rows=figure_rows(before, after)),
        Section("Its course", ["Shares of held-out pictures by step."], chart=course),
        Section("Patch features", [components], groups=shown.as_strips(component_pictures)),
        Section("Attention", [f"Where {guide} looks, mean over heads."], groups=shown.as_strips(shown.attention)),
        Section("Nearest patches", [near], groups=shown.nearest()),
        Section("Settings", headings=["setting", "value"], rows=flattened(result_settings(config))),
    ]
    write_page(path, f"{record['network']}, tuned on {images.train.manifest.dataset}", lead, sections)


def card_of(record: Mapping[str, Any], images: Unlabelled, config: Any) -> str:
    """The README.md beside released weights: what they are, what they were tuned on, figures, how to load them."""
    load = {
        "timm": 'timm.create_model("local-dir:FOLDER", pretrained=True)',
        "hf": 'transformers.AutoModel.from_pretrained("FOLDER")',
    }[config.save_as]
    rows = ["| figure | before | after |", "|---|---|---|"]
    rows += [
        f"| {name} | {before} | {after} |" for name, before, after in figure_rows(record["before"], record["after"])
    ]
    looks = ["| step | " + " | ".join(SHARES[name] for name in SHARES if name in record["before"]) + " | rank |"]
    looks.append("|---" * (looks[0].count("|") - 1) + "|")
    for row in record["looks"]:
        shares = [f"{100 * row[name]['value']:.1f}" for name in SHARES if name in row]
        looks.append("| " + " | ".join([str(row["step"]), *shares, f"{row['rank']:.1f}"]) + " |")
    manifest = images.train.manifest
    how = f"low-rank updates of rank {config.lora_rank}, merged," if config.lora_rank else "all weights"
    return "\n".join([
        f"# {record['network']}, tuned on {manifest.dataset}", "",
        f"Weights of {config.network}, tuned without labels by dense tuning (DEFEND, Salehi et al., 3.1) with "
        f"bigtrain: {how} of the last {config.tuned_blocks} blocks, {record['prototypes']} prototypes, "
        f"{config.tune_epochs} epochs on {record['images']} pictures of {manifest.dataset} (licence of the pictures: "
        f"{manifest.licence or 'not stated'}), seed {record['seed']}; kept is step {record['kept_step']}."
        + (f" Tuning was stopped, because {record['stopped']}." if record["stopped"] else ""), "",
        f"Pixels: {config.image_size} x {config.image_size}, normalised as in the config. Load: `{load}`, or as "
        "`--teacher FOLDER` of bigtrain.", "",
        f"## Figures on {record['after']['images']} held-out pictures, shares in % with 95 % intervals", "", *rows, "",
        "## Their course", "", *looks, "",
    ])  # fmt: skip
