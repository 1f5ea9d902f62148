"""The classical detectors that Perera & Patel (CVPR 2019, 5.1) compare with, on features of any layer of any network.

    accelerate launch recipes/deep_novelty.py --train data/birds --protocol first-half --branches one \
        --membership-weight 0 --out runs/finetuned
    accelerate launch recipes/baselines.py --train data/birds --protocol first-half --finetuned \
        runs/finetuned/network.safetensors --out runs/birds-baselines

Features are extracted once, and kept. Rows with "pre" are of --network as it is given; those without of --finetuned,
the network of the first command, row (a) of 5.4, whose logits serve the methods on logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.choices import Chosen, setting
from bigtrain.data.protocol import Split
from bigtrain.detectors.catalogue import EVERY, EVERY_ROW, ON_FEATURES, detector_class
from bigtrain.models.timm_names import check_source
from bigtrain.training.mixins import DataMixin, JudgeMixin, NetworkMixin, RunMixin, check_network
from bigtrain.training.read_split import read_split
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from bigtrain.detectors.network_detector import NetworkDetector
    from bigtrain.models.network import Network
    from bigtrain.training.feature_table import Inputs, Row
    from bigtrain.training.run_setup import Setup


@dataclass(frozen=True)
class Config(RunMixin, JudgeMixin, NetworkMixin, DataMixin):
    finetuned: str = ""
    """A network trained on the same known classes: network.safetensors of a run of recipes/deep_novelty.py with
    --branches one --membership-weight 0. Give both the same data and --seed, --protocol, --order, --train-limit and
    --validation-share, or images it was trained on are held out here."""
    layer: str = ""  # The layer whose features are taken, by torch's name; empty: what the classifier would see.
    detectors: tuple[str, ...] = ()  # Which detectors, by name; empty: all that these classes and networks allow.
    nu: float = setting(0.1, 1e-6, 1)  # Of the one-class SVM and SVDD: largest share of known images outside.
    local_neighbours: int = setting(600, 1)  # k of local KNFST.
    landmarks: int = setting(0, 0)
    """Of KNFST: 0 is exact, up to 20 000 images; else Nystroem's kernel of this many of them."""
    share: float = setting(0.1, 1e-6, 1 - 1e-6)  # Of K-extremes: share of the dimensions that make a signature.
    save: tuple[str, ...] = (EVERY_ROW,)
    """Rows whose detector is saved, in OUT/detectors/ROW, with its network, which rows share on disk; all, or none."""
    features: str = ""  # Folder that keeps features, for several runs; empty: the run's own.


def check(config: Config) -> None:
    check_network(config)
    if unknown := [name for name in config.detectors if name not in EVERY]:
        raise ValueError(f"there is no detector {', '.join(unknown)}; there are {', '.join(EVERY)}.")
    rows = {*EVERY, *(f"{name} pre" for name in EVERY), EVERY_ROW, "none"}
    if unknown := [name for name in config.save if name not in rows]:
        raise ValueError(
            f"--save names {', '.join(unknown)}; it may be all, none, or of {', '.join(EVERY)}, each also with pre."
        )
    if config.finetuned:
        check_source(config.finetuned)


def load(config: Config, split: Split, precision: Chosen) -> dict[str, NetworkDetector]:
    """The networks whose features are taken, by the suffix of their rows."""
    from bigtrain.detectors.classical.logits import MaxLogit
    from bigtrain.models.load_network import load_network
    from bigtrain.training.trunk import network_detector, read_network

    known = split.protocol.known
    given = read_network(config)
    networks: dict[str, Network] = {"" if given.head_of(known) else " pre": given}
    if config.finetuned:
        finetuned = load_network(config.finetuned)
        if not finetuned.head_of(known):
            raise ValueError(
                f"--finetuned {config.finetuned} has other classes than the {len(known)} known ones: train it "
                "with recipes/deep_novelty.py --branches one --membership-weight 0 and the same --known, --novel or "
                "--protocol, --order and --seed."
            )
        networks = {" pre": given, "": finetuned}
    return {
        suffix: network_detector(network, MaxLogit(), config, precision, layer=config.layer)
        for suffix, network in networks.items()
    }


def baselines(config: Config, setup: Setup, split: Split, networks: Mapping[str, NetworkDetector]) -> Result:
    """Extract features and logits, fit each detector to them, and judge all in one table."""
    from bigtrain.runtime.settings import result_settings
    from bigtrain.training.feature_table import Table, read_inputs, score_rows
    from bigtrain.training.row_cards import write_cards

    described = "; ".join(f"{its.network.architecture.model}{n}, {its.network.report}" for n, its in networks.items())
    setup.announce(f"baselines: {split}; {described}")
    folder = Path(config.features) if config.features else setup.run / "features"
    rows: dict[str, Row] = {}
    for suffix, source in networks.items():
        source.network.to(setup.accelerator.device)
        seen = read_inputs(folder, setup, source, split)
        rows |= rows_of(config, seen.inputs, suffix, len(split.protocol.known), setup.accelerator.print)
    if not rows:
        raise ValueError("none of --detectors fits these classes and networks (see above): name others.")
    quantile = config.threshold_percentile / 100
    scores, not_fitted = score_rows(setup, rows, quantile=quantile, save=config.save)
    table = Table(split, seen, rows, scores, not_fitted, quantile=quantile, seed=config.seed)
    if setup.accelerator.is_main_process:
        table.write_scores(setup.run / "scores.parquet")
        table.write_report(setup.run / "report.html", "Classical detectors", result_settings(config))
        write_cards(table, setup.run / "detectors", result_settings(config))
    return Result(table.results("baselines"), table.lines())


def rows_of(
    config: Config, inputs: Mapping[str, Inputs], suffix: str, known_classes: int, say: Callable[[str], None]
) -> dict[str, Row]:
    """The rows of one network: each detector, and what it is fitted to (5.1)."""
    from bigtrain.training.feature_table import Row

    has_negative = bool((inputs["features"].fitted_ND < 0).any())
    kernel = "rbf" if has_negative else "intersection"
    options: dict[str, dict[str, Any]] = {
        "one-class SVM": {"nu": config.nu},
        "SVDD": {"nu": config.nu},
        "KNFST": {"kernel": kernel, "landmarks": config.landmarks, "seed": config.seed},
        "local KNFST": {"kernel": kernel, "neighbours": config.local_neighbours},
        "K-extremes": {"share": config.share},
        "Gaussian mixture": {"seed": config.seed},
    }
    rows: dict[str, Row] = {}
    for name in EVERY:
        if config.detectors and name not in config.detectors:
            continue
        kind = detector_class(name)
        if known_classes < kind.fewest_classes:
            say(f"{name} is left out: it tells known classes apart, and there is only one")
        elif name in ON_FEATURES:
            rows[name + suffix] = Row(kind(**options.get(name, {})), inputs["features"])
        elif "logits" in inputs:
            rows[name + suffix] = Row(kind(), inputs["logits"])
    if has_negative and any("KNFST" in name for name in rows):
        say(f"KNFST{suffix}: these features have negative values, so the kernel is RBF instead of the intersection")
    return rows


read = partial(read_split, single_labels=True)
main = partial(run_recipe, Recipe("baselines", Config, __doc__ or "", check, read, load, baselines))

if __name__ == "__main__":
    main()
