"""Globally negative filters made visible: Perera & Patel, CVPR 2019, section 4.3, figures 2 and 3b.

A filter is a feature at the trunk's end, the one that a head's weights are of: of a network that averages its last
maps, a filter of its last convolution; of VGG16 and AlexNet a unit of fc7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.protocol import Split
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.evaluation.collect import collect
from bigtrain.evaluation.report.page import Group, Section, Strip, card, write_page
from bigtrain.models.network import Network

Floats = NDArray[np.float64]
CLASSES, FILTERS, PICTURES = 10, 3, 6  # shown: classes, filters of each kind and class, pictures of each filter
SHARES = (1.0, 0.9, 0.75, 0.5)  # of the known classes that a filter speaks against


def against_most(known_CD: Floats, reference_CD: Floats, share: float) -> NDArray[np.bool_]:
    """Which filters speak against at least a share of the known classes and for some reference class: bool (D,).

    Share 1 is the paper's globally negative filters; with many known classes hardly any filter is one.
    """
    return np.logical_and((known_CD < 0).mean(axis=0) >= share, (reference_CD > 0).any(axis=0))


def mean_and_interval(value_N: Floats) -> dict[str, float]:
    """The mean over images with its normal 95 % interval."""
    half = 1.96 * float(value_N.std(ddof=1)) / np.sqrt(len(value_N)) if len(value_N) > 1 else float("inf")
    return {"value": float(value_N.mean()), "low": float(value_N.mean()) - half, "high": float(value_N.mean()) + half}


def images_by_kind(split: Split, reference: ShardSet) -> dict[str, tuple[ShardSet, NDArray[np.int64]]]:
    """Known and novel test images, and all reference images: what filters are examined on."""
    is_known_N = split.protocol.is_known(split.test)[split.test_N]
    return {
        "known": (split.test, split.test_N[is_known_N]),
        "novel": (split.test, split.test_N[~is_known_N]),
        "reference": (reference, np.arange(len(reference))),
    }


def write_filters(
    path: Path,
    accelerator: Accelerator,
    streams: Mapping[str, Stream],
    features: Callable[[Tensor], Tensor],
    network: Network,
) -> dict[str, Any]:
    """Look for the globally negative filters of a trained network and write the page; called on all ranks.

    Args:
        streams: "known", "novel", "reference" -> images of that kind, unshuffled.
        features: uint8 images to the trunk's features.
        network: with the heads "known" and "reference".

    Returns:
        How many there are; for each kind of image their mean activation, in units of each filter's mean over all
        images, and the mean of what they take from the best known class's score. As "graded", the number and the
        activation of the filters against at least a share of the known classes.
    """
    heads = ("known", "reference")
    known, reference = (network.heads[name].weight.detach().double().cpu().numpy() for name in heads)
    known_classes, reference_classes = (network.classes[name] for name in heads)
    found = {kind: collect(accelerator, stream, {"f": features}) for kind, stream in streams.items()}
    activation = {kind: values["f"] for kind, (_, values) in found.items()}
    results = filter_figures(known, reference, activation)
    if accelerator.is_main_process:
        samples = [(streams[kind].shard_set, int(s), kind) for kind, (sample_N, _) in found.items() for s in sample_N]
        everything_ND = np.concatenate(list(activation.values()))
        is_negative_D = against_most(known, reference, 1.0) & (np.abs(everything_ND).mean(axis=0) > 0)
        sections = [summary_section(results, {kind: len(own) for kind, own in activation.items()})]
        sections.append(graded_section(results["graded"], list(activation)))
        sections += [
            class_section(name, known, number, is_negative_D, reference, reference_classes, everything_ND, samples)
            for number, name in enumerate(known_classes[:CLASSES])
        ]
        lead = [
            "A filter is a feature at the end of the trunk; its weight says whether it speaks for a class (positive) "
            "or against it. Globally negative filters speak against every known class and for some reference class: a "
            "picture that excites them is novel (Perera & Patel 2019, 4.3).",
            f"Shown are the first {min(CLASSES, len(known_classes))} of {len(known_classes)} known classes; the number "
            "below a picture is the filter's activation.",
        ]
        write_page(path, "What the filters of this network answer to", lead, sections)
    accelerator.wait_for_everyone()
    return results


def filter_figures(known: Floats, reference: Floats, activation: Mapping[str, Floats]) -> dict[str, Any]:
    """The record of `write_filters`, from the heads' weights (C, D) and the filters' activations (N, D) by kind."""
    everything_ND = np.concatenate(list(activation.values()))
    scale_D = np.abs(everything_ND).mean(axis=0)
    against = {share: against_most(known, reference, share) & (scale_D > 0) for share in SHARES}
    is_negative_D = against[1.0]
    results: dict[str, Any] = {"globally_negative": int(is_negative_D.sum()), "filters": len(is_negative_D)}
    relative = {kind: own_ND / scale_D.clip(1e-12) for kind, own_ND in activation.items()}

    def mean_activation(is_chosen_D: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
        if not is_chosen_D.any():
            return {}
        return {kind: mean_and_interval(own_ND[:, is_chosen_D].mean(axis=1)) for kind, own_ND in relative.items()}

    if is_negative_D.any():
        results["activation"], results["evidence"] = mean_activation(is_negative_D), {}
        for kind, own_ND in activation.items():
            best_N = (own_ND @ known.T).argmax(axis=1)
            results["evidence"][kind] = mean_and_interval((own_ND * known[best_N])[:, is_negative_D].sum(axis=1))
    results["graded"] = [
        {"share": share, "filters": int(is_against_D.sum()), "activation": mean_activation(is_against_D)}
        for share, is_against_D in against.items()
    ]
    return results


def summary_section(results: Mapping[str, Any], counts: Mapping[str, int]) -> Section:
    text = [f"{results['globally_negative']} of {results['filters']} filters are globally negative."]
    if "activation" not in results:
        return Section("Globally negative filters", text)
    text.append(
        "Activation: of these filters, in units of each one's mean over all pictures here; 1 is no preference. "
        "Evidence: what they add to the score of the known class that answers most. Means with 95 % intervals."
    )
    rows = [
        [kind, str(count), cell(results["activation"][kind]), cell(results["evidence"][kind])]
        for kind, count in counts.items()
    ]
    return Section("Globally negative filters", text, ["pictures", "number", "activation", "evidence"], rows)


def graded_section(graded: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Section:
    text = [
        "A filter against all known classes is rare where they are many. Here are those against at least a share of "
        "them, and for some reference class, with their activation as above: evidence of novelty where it is higher on "
        "novel than on known pictures."
    ]
    rows = [
        [f"{100 * one['share']:.0f} %", str(one["filters"])]
        + [cell(one["activation"][kind]) if one["filters"] else "" for kind in kinds]
        for one in graded
    ]
    return Section("Filters against most known classes", text, ["against", "filters", *kinds], rows)


def cell(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.3g} ({figure['low']:.3g} .. {figure['high']:.3g})"


def class_section(
    name: str,
    known_CD: Floats,
    number: int,
    is_negative_D: NDArray[np.bool_],
    reference_CD: Floats,
    reference_classes: Sequence[str],
    activation_ND: Floats,
    samples: Sequence[tuple[ShardSet, int, str]],
) -> Section:
    """The filters that speak most for a class, and the globally negative ones that speak most against it; where there
    are none, those that speak against most classes."""
    weight_D, against_D = known_CD[number], (known_CD < 0).sum(axis=0)

    def strip(d: int) -> Strip:
        strongest = np.argsort(-activation_ND[:, d], kind="stable")[:PICTURES]
        cards = [card(*samples[int(n)], float(activation_ND[n, d])) for n in strongest]
        for_reference = reference_classes[int(reference_CD[:, d].argmax())]
        label = f"filter {d}, weight {weight_D[d]:+.3g}, against {against_D[d]} of {len(known_CD)} known classes; "
        return Strip(f"{label}of the reference most for {for_reference}", cards)

    positive = [int(d) for d in np.argsort(-weight_D)[:FILTERS] if weight_D[d] > 0]
    negative = [int(d) for d in np.argsort(weight_D) if is_negative_D[d]][:FILTERS]
    title = "Top globally negative filters"
    if not negative:
        title = "No filter is globally negative; these speak against most known classes"
        negative = [int(d) for d in np.lexsort((weight_D, -against_D)) if (reference_CD[:, d] > 0).any()][:FILTERS]
    groups = [Group("Top positive filters", [strip(d) for d in positive]), Group(title, [strip(d) for d in negative])]
    return Section(name, groups=groups)
