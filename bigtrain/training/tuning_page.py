"""What tuning has changed, for people: a page with figures and pictures of patches, and a card beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bigtrain import __version__
from bigtrain.data.decode import Picture
from bigtrain.data.views import Resized
from bigtrain.evaluation.report.charts import curve_chart
from bigtrain.evaluation.report.overlays import overlay, picture_fields, scale_of
from bigtrain.evaluation.report.page import Group, Section, Strip, write_page
from bigtrain.evaluation.report.report import flattened
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
            rows.append([words, *(f"{row[name]:.3g}" if name in row else "" for row in (before, after))])
    return rows


def write_page_of(
    path: Path, config: Any, images: Unlabelled, given: Network, tuned: Network, record: Mapping[str, Any]
) -> None:
    """Write report.html: figures before and after, their course, and what patches look like to both networks."""
    sample_P = images.held_out_N[np.linspace(0, len(images.held_out_N) - 1, min(AMONG, len(images.held_out_N)))
                                 .astype(int)].tolist()  # fmt: skip
    view, rng = Resized(config.image_size), np.random.default_rng(0)
    read = [Picture(payload) for payload in images.train.read(sample_P)]
    images_P3HW = torch.stack([torch.from_numpy(view(picture, rng)["image"]) for picture in read])
    seen = {"before": seen_by(given, images_P3HW), "after": seen_by(tuned, images_P3HW)}
    pictures = as_pictures(images_P3HW)
    names = [(images.train.key(sample), images.train.classes_of(sample)) for sample in sample_P]

    def cards(shown: Sequence[Image.Image], of: Sequence[int], notes: Sequence[str] = ()) -> list[dict[str, Any]]:
        notes = notes or [""] * len(of)
        return [
            picture_fields(image, *names[place]) | {"kind": "", "value": note}
            for image, place, note in zip(shown, of, notes, strict=True)
        ]

    first = list(range(min(SHOWN, len(pictures))))
    shown = [pictures[place] for place in first]
    parts = {when: Seen(each.tokens_PND[first], each.attention_PN[first], each.grid) for when, each in seen.items()}
    components = [Strip("pictures", cards(shown, first))]
    attended = [Strip("pictures", cards(shown, first))]
    for when, each in parts.items():
        components.append(Strip(when, cards(component_pictures(each), first)))
        maps = [attention_N.reshape(each.grid) for attention_N in each.attention_PN]
        scale = scale_of(maps)
        attended.append(Strip(when, cards([overlay(s, m, scale) for s, m in zip(shown, maps, strict=True)], first)))
    near = []
    for place in first[:QUERIES]:
        patch, grid = telling_patch(seen["before"], place), seen["before"].grid
        strips = [Strip("looked for", cards([around_patch(pictures[place], grid, patch)], [place]))]
        for when, each in seen.items():
            found = nearest_patches(each, place, patch, NEAREST)
            parts_found = [around_patch(pictures[other], grid, at) for other, at, _ in found]
            similar = [f"cosine {cosine:.2f}" for *_, cosine in found]
            strips.append(Strip(f"nearest, {when}", cards(parts_found, [other for other, *_ in found], similar)))
        near.append(Group(names[place][0], strips))
    before, after = record["before"], record["after"]
    lead = [
        f"{record['network']}, tuned without labels on {images}. Figures are of {after['images']} held-out pictures; "
        f"the state of step {after['step']} is kept."
    ]
    if record["stopped"]:
        lead.append(f"Tuning was stopped, for {record['stopped']}: what is kept is the best state before.")
    curves = {
        words: np.array([[row["step"], row[name]["value"]] for row in record["looks"]])
        for name, words in SHARES.items() if name in before
    }  # fmt: skip
    guide = given.vit.guide
    sections = [
        Section("Before and after", headings=["figure", "before", "after"], rows=figure_rows(before, after)),
        Section("Its course", ["Shares of held-out pictures by step."], chart=curve_chart(curves, x_label="step")),
        Section(
            "Patch features", ["The first three principal components of all shown patches as red, green and blue, for "
            "each network its own: patches of one colour are alike."], groups=[Group("", components)],
        ),
        Section("Attention", [f"Where {guide} looks, the mean over heads."], groups=[Group("", attended)]),
        Section(
            "Nearest patches", [f"Of the patch that {guide} looks at most, the nearest patch of other pictures, with "
            f"the patches around it; among {len(pictures)} pictures."], groups=near,
        ),
        Section("Settings", headings=["setting", "value"], rows=flattened(result_settings(config))),
    ]  # fmt: skip
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
        f"Weights of {config.network}, tuned without labels by dense tuning (DEFEND, Salehi et al., 3.1) with bigtrain "
        f"{__version__}: {how} of the last {config.tuned_blocks} blocks, {record['prototypes']} prototypes, "
        f"{config.tune_epochs} epochs on {record['images']} pictures of {manifest.dataset} (licence of the pictures: "
        f"{manifest.licence or 'not stated'}), seed {record['seed']}; kept is step {record['kept_step']}."
        + (f" Tuning was stopped, for {record['stopped']}." if record["stopped"] else ""), "",
        f"Pixels: {config.image_size} x {config.image_size}, normalised as in the config. Load: `{load}`, or as "
        "`--teacher FOLDER` of bigtrain.", "",
        f"## Figures on {record['after']['images']} held-out pictures, shares in % with 95 % intervals", "", *rows, "",
        "## Their course", "", *looks, "",
    ])  # fmt: skip
