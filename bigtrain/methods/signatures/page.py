"""Pictures of extreme value signatures (Schultheiss et al. 2017): which class has which dimensions, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from bigtrain.data.stream import Stream
from bigtrain.evaluation.collect import collect
from bigtrain.evaluation.report.overlays import page_image
from bigtrain.evaluation.report.page import Group, Section, Strip, card, write_page
from bigtrain.methods.signatures.detector import Signatures

PAIRS, DIMENSIONS, PICTURES = 10, 3, 6  # shown: pairs of classes, dimensions of each, pictures of each dimension
CELL = 4  # pixels of the matrix's cells, at least one
WIDEST = 1600  # pixels of the matrix


def write_signatures(
    path: Path, accelerator: Accelerator, fitted: Signatures, images: Stream, features: Callable[[Tensor], Tensor]
) -> None:
    """Write the page; called on all ranks.

    Args:
        images: known training images, unshuffled, among which are looked for those that drive a dimension.
        features: uint8 images to the features that were fitted.
    """
    sample_N, values = collect(accelerator, images, {"f": features})
    if accelerator.is_main_process:
        has_CD = fitted.signature_CD_ > 0
        classes = [str(name) for name in fitted.classes_]
        lead = [
            f"The signature of a class: the {fitted.count_} of {fitted.width_} dimensions with its largest mean "
            "activations. A picture is novel where its own largest activations are in no class's signature."
        ]
        sections = [matrix_section(has_CD, classes)]

        def strip(dimension: int) -> Strip:
            value_N = values["f"][:, dimension]
            # activations may have a ceiling (ReLU6): of equal ones, first those that stand out from the rest of theirs
            strongest = np.lexsort((values["f"].mean(axis=1), -value_N))[:PICTURES]
            cards = [
                card(images.shard_set, int(sample_N[n]), "known", float(values["f"][n, dimension])) for n in strongest
            ]
            in_classes = int(has_CD[:, dimension].sum())
            return Strip(f"dimension {dimension}, in {in_classes} of {len(classes)} signatures", cards)

        if len(classes) > 1:
            sections.append(pairs_section(has_CD, fitted.mean_CD_, classes, strip))
        sections.append(classes_section(has_CD, fitted.mean_CD_, classes, strip))
        write_page(path, "Extreme value signatures", lead, sections)
    accelerator.wait_for_everyone()


def clustered(has_ND: NDArray[np.bool_]) -> NDArray[np.int64]:
    """An order in which rows that are alike lie side by side: average linkage of their Jaccard distances."""
    if len(has_ND) < 3:
        return np.arange(len(has_ND))
    return leaves_list(linkage(has_ND, "average", metric="jaccard")).astype(np.int64)


def matrix_section(has_CD: NDArray[np.bool_], classes: list[str]) -> Section:
    """Classes x dimensions, both in clustered order; dimensions that are in no signature are left out."""
    used_D = np.flatnonzero(has_CD.any(axis=0))
    rows, columns = clustered(has_CD), used_D[clustered(has_CD[:, used_D].T)]
    cell = max(1, min(CELL, WIDEST // len(columns)))
    matrix_CD = np.where(has_CD[np.ix_(rows, columns)], 32, 235).astype(np.uint8)
    image = Image.fromarray(matrix_CD.repeat(max(cell, min(16, 400 // len(rows))), axis=0).repeat(cell, axis=1))
    text = [
        f"A row is a class, a column a dimension; dark: it is in the signature. {len(columns)} of {has_CD.shape[1]} "
        "dimensions are in any. Both are ordered so that those alike lie side by side.",
        f"From above: {', '.join(classes[row] for row in rows)}.",
    ]
    return Section("Classes and dimensions", text, image=page_image(image))


def pairs_section(
    has_CD: NDArray[np.bool_], mean_CD: NDArray[np.float32], classes: list[str], strip: Callable[[int], Strip]
) -> Section:
    """The pairs of classes that share most, and the shared dimensions that fewest others have."""
    shared_CC = has_CD.astype(int) @ has_CD.T.astype(int)
    first, second = np.triu_indices(len(classes), 1)
    strongest = np.argsort(-shared_CC[first, second], kind="stable")[:PAIRS]
    groups = []
    for a, b in zip(first[strongest], second[strongest], strict=True):
        both_D = np.flatnonzero(has_CD[a] & has_CD[b])
        weaker_D = np.minimum(mean_CD[a, both_D], mean_CD[b, both_D])
        best = both_D[np.lexsort((-weaker_D, has_CD[:, both_D].sum(axis=0)))[:DIMENSIONS]]
        title = f"{classes[a]} and {classes[b]}: {len(both_D)} of {int(has_CD[a].sum())} dimensions"
        groups.append(Group(title, [strip(int(d)) for d in best]))
    return Section(
        "What two classes share",
        ["The pairs that share most, with those of the shared dimensions that fewest others have."],
        groups=groups,
    )


def classes_section(
    has_CD: NDArray[np.bool_], mean_CD: NDArray[np.float32], classes: list[str], strip: Callable[[int], Strip]
) -> Section:
    """For each class the dimensions of its signature that fewest others have, and the pictures that drive them."""
    groups = []
    for number, name in enumerate(classes[:PAIRS]):
        own_D = np.flatnonzero(has_CD[number])
        rarest = np.lexsort((-mean_CD[number, own_D], has_CD[:, own_D].sum(axis=0)))[:DIMENSIONS]
        groups.append(Group(name, [strip(int(d)) for d in own_D[rarest]]))
    text = ["The dimensions of a class that fewest others have, with the known pictures of any class that drive them."]
    if len(classes) > PAIRS:
        text.append(f"The first {PAIRS} of {len(classes)} classes.")
    return Section("What a class has of its own", text, groups=groups)
