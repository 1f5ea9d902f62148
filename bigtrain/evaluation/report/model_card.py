"""The card of a detector's folder, written from its run: what it was trained on, how it was judged, its limits."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bigtrain.evaluation.metrics import IN_REPORT
from bigtrain.evaluation.report.overlays import rgb
from bigtrain.files import whole_file, write_text
from bigtrain.text import clean

CARD_FILE, NEAR_FILE = "README.md", "threshold.jpg"
NEAR = 4  # pictures below the threshold, and as many above
TILE = 128  # pixels


def write_card(
    folder: Path,
    *,
    method: str,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    figures: Mapping[str, Any] | None,
    licences: Mapping[str, str],
    near: Sequence[tuple[float, Image.Image]] = (),
) -> None:
    """Write README.md, and `threshold.jpg` of the pictures whose scores lie around the threshold.

    Args:
        folder: of a saved detector.
        results: of results.json: "dataset", "known", "novel", "held_out_known", "seed".
        settings: of the run.
        figures: of `metrics.summary`; None of a run on normal pictures alone.
        licences: of the data and of the weights, as far as they are known.
        near: (score, picture), by score.
    """
    record = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
    if near:
        write_near(folder / NEAR_FILE, [image for _, image in near])
    text = "\n\n".join(
        part
        for part in (
            front_matter(method, results, figures, licences),
            f"# {plain(method)} for {plain(results['dataset'])}",
            f"A novelty detector, made with bigtrain {record['bigtrain']}. It scores how unlike the known pictures a "
            "picture is: higher = more novel.",
            use(),
            data_lines(results, settings, licences),
            figure_table(figures, results),
            threshold_lines(record, near),
            limits(),
            "## How it was made\n\n```\n" + command() + "\n```",
        )
        if part
    )
    write_text(folder / CARD_FILE, text + "\n")


def front_matter(
    method: str, results: Mapping[str, Any], figures: Mapping[str, Any] | None, licences: Mapping[str, str]
) -> str:
    """Of Hugging Face's hub, with the figures as its model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = plain(str(results["dataset"])) or "unnamed"
    found = [
        EvalResult(
            task_type="image-classification", task_name="novelty detection", dataset_type=dataset, dataset_name=dataset,
            dataset_split="test", metric_type=name, metric_name=IN_REPORT[name].heading,
            metric_value=round(float(figures[name]["value"]), 4),
        )
        for name in IN_REPORT
        if figures
    ]  # fmt: skip
    licence = licences.get("data", "") if licences.get("data", "") in OPEN else "other"
    card = ModelCardData(
        model_name=f"{plain(method)} for {dataset}",
        library_name="bigtrain",
        license=licence,
        tags=["novelty-detection", "anomaly-detection", "out-of-distribution-detection"],
        eval_results=found or None,
    )
    return f"---\n{card.to_yaml()}\n---"


OPEN = ("mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause")


def use() -> str:
    return (
        "## Use\n\n```\nbigtrain score --detector hf://USER/NAME --images photos --out scores.csv --page novel.html\n"
        '```\n\n```python\nimport bigtrain\n\ndetector = bigtrain.load_detector("hf://USER/NAME")\n'
        'detector.judge(["photo.jpg"])  # score, p-value, decision, class, map\n```'
    )


def data_lines(results: Mapping[str, Any], settings: Mapping[str, Any], licences: Mapping[str, str]) -> str:
    known, novel = (", ".join(plain(name) for name in results[kind]) or "none" for kind in ("known", "novel"))
    weights = plain(str(settings.get("teacher") or settings.get("network") or "of its own"))
    return (
        f"## Data and protocol\n\n- data set: {plain(str(results['dataset']))}; its licence: "
        f"{plain(licences.get('data', '')) or 'not told'}\n- known classes: {known}\n"
        f"- novel classes, seen in no training: {novel}\n"
        f"- first weights: {weights}; their licence: {plain(licences.get('weights', '')) or 'not told'}\n"
        f"- seed {results['seed']}; {results['held_out_known']} known pictures were held out for the threshold"
    )


def figure_table(figures: Mapping[str, Any] | None, results: Mapping[str, Any]) -> str:
    if not figures:
        return "## Figures\n\nIt was trained on normal pictures alone: no figure says how well novelty is found."
    rows = [
        f"| {its.heading} | {100 * figures[name]['value']:.1f} | {100 * figures[name]['low']:.1f} to "
        f"{100 * figures[name]['high']:.1f} |"
        for name, its in IN_REPORT.items()
    ]
    beside = [
        f"- {plain(name)}: AUROC {100 * its['auroc']['value']:.1f}"
        for name, its in results.get("comparisons", {}).items()
    ]
    plainly = "\n\nBeside it, on the same pictures:\n\n" + "\n".join(beside) if beside else ""
    return (
        "## Figures\n\nOn the test split, in percent, with 95 % intervals:\n\n"
        "| figure | value | interval |\n|---|---|---|\n" + "\n".join(rows) + plainly
    )


def threshold_lines(record: Mapping[str, Any], near: Sequence[Any]) -> str:
    if record.get("threshold") is None:
        return "## Threshold\n\nThere is none: no picture was held out. Set one with `bigtrain calibrate`."
    count = len((record.get("calibration") or {}).get("held_out_scores", ()))
    said = (
        f"## Threshold\n\nScores above {record['threshold']:.6g} are called novel: "
        f"{100 * record['threshold_quantile']:g} % of {count} held-out known pictures score no higher. For a new "
        "camera or place set it anew with `bigtrain calibrate --normal DIR`."
    )
    return said + (f"\n\n![The pictures around the threshold, by score]({NEAR_FILE})" if near else "")


def write_threshold(folder: Path, record: Mapping[str, Any]) -> None:
    """Have the card of a detector that was calibrated anew tell its threshold; the pictures around the old one go."""
    (folder / NEAR_FILE).unlink(missing_ok=True)
    if (folder / CARD_FILE).is_file():
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
        before, _, rest = text.partition("## Threshold")
        _, _, after = rest.partition("\n## ")
        by = f" They are of {plain(str(record['calibration']['pictures']))}, set after training."
        write_text(folder / CARD_FILE, f"{before}{threshold_lines(record, ())}{by}\n\n## {after}")


def limits() -> str:
    return (
        "## Limits\n\nA score says how unlike the known pictures a picture is, not why. p-values and thresholds hold "
        "for pictures that come as the held-out ones did: another camera, light or compression changes scores without "
        "anything being novel. Novel classes other than those it was judged on may be found better or worse."
    )


def command() -> str:
    name = Path(sys.argv[0]).name
    return clean(shlex.join([f"recipes/{name}" if Path(sys.argv[0]).parent.name == "recipes" else name, *sys.argv[1:]]))


def plain(text: str) -> str:
    """Without what Markdown, HTML or YAML would take for its own."""
    return "".join(letter if letter.isalnum() or letter in " -_.,:/()" else "_" for letter in clean(text)).strip()


def write_near(path: Path, images: Sequence[Image.Image]) -> None:
    strip = Image.new("RGB", (TILE * len(images), TILE), "white")
    for place, image in enumerate(images):
        shown = rgb(image)
        shown.thumbnail((TILE - 4, TILE - 4))
        strip.paste(shown, (place * TILE + (TILE - shown.width) // 2, (TILE - shown.height) // 2))
    with whole_file(path) as file:
        strip.save(file, "JPEG", quality=85)
