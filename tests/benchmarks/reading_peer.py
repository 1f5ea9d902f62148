"""How fast litdata or mosaicml-streaming reads pictures in its own format; run by reading.py in their interpreter.

    python reading_peer.py litdata|mosaicml-streaming FOLDER PICTURES.json

The first call writes FOLDER. Prints JSON: samples, their bytes, samples a second of the best of three passes.
"""

import json
import sys
import time
from pathlib import Path


def read(path):
    return {"image": Path(path).read_bytes()}


def litdata_set(folder, pictures):
    import litdata

    if not folder.is_dir():
        litdata.optimize(read, pictures, str(folder), chunk_bytes="64MB", num_workers=1)
    return litdata.StreamingDataset(str(folder), shuffle=False)


def mosaicml_set(folder, pictures):
    import streaming

    if not folder.is_dir():
        with streaming.MDSWriter(out=str(folder), columns={"image": "bytes"}) as writer:
            for path in pictures:
                writer.write(read(path))
    return streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=32)


def main():
    peer, folder, listing = sys.argv[1:]
    make = {"litdata": litdata_set, "mosaicml-streaming": mosaicml_set}[peer]
    data = make(Path(folder), json.loads(Path(listing).read_text()))
    best = 0.0
    for _ in range(3):  # the first pass warms up
        began, total, count = time.perf_counter(), 0, 0
        for sample in data:
            total, count = total + len(sample["image"]), count + 1
        best = max(best, count / (time.perf_counter() - began))
    print()
    print(json.dumps([count, total, best]))


if __name__ == "__main__":
    main()
