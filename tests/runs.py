"""What a run folder says, for tests."""

import json
import time

import pyarrow.parquet as pq

from bigtrain.data.decode import Picture
from bigtrain.data.shard_set import ShardSet


def rows(run):
    log = run / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def losses(run, stage=None):
    """The loss of each step in the log, of one stage or of all."""
    return [row["loss"] for row in rows(run) if "loss" in row and stage in (None, row["stage"])]


def events(run, kind):
    return [row for row in rows(run) if row.get("event") == kind]


def results(run):
    return json.loads((run / "results.json").read_text())


def scores(run):
    return pq.read_table(run / "scores.parquet").to_pandas()


def judged_images(run):
    """The rows of the images that a run was judged on, and these images."""
    test = ShardSet(json.loads((run / "config.json").read_text())["settings"]["test"])
    judged = scores(run).set_index("key").query("split == 'test'")
    places = [test.keys().index(key) for key in judged.index]
    return judged, [Picture(payload).rgb() for payload in test.read(places)]


def ask_to_stop(run, step):
    """Leave a file `stop` once so many steps are in the log."""
    while len(losses(run)) < step:
        time.sleep(0.005)
    (run / "stop").touch()
