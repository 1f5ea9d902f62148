"""A detector in use beside the run that trained it: `bigtrain score` and the run's own scoring of the same shard set,
and `bigtrain serve` under load beside both. Rates as ratios, in turn.

    python tests/benchmarks/serving.py RUN SHARDS --images 4000 --rounds 3 --load 2000
"""

import argparse
import http.client
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator

import bigtrain
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.evaluation.collect import collect
from bigtrain.runtime.launch import threads_of_process, workers_of_process
from bigtrain.serving.score import score
from bigtrain.serving.score_job import Options


def rate_of_run(accelerator, detector, shard_set, sample_N):
    """Pictures a second of the judge's own way: the stream, the detector, what is gathered."""
    plan = shard_set.plan(sample_N, detector.scoring.batch, shuffle=False)
    workers = workers_of_process("auto", on_gpu=accelerator.device.type == "cuda")
    began = time.monotonic()
    stream = Stream(shard_set, plan, detector.view(), rank=0, world_size=1, workers=workers)
    found_N, _ = collect(accelerator, stream, {"score": lambda images: detector.score_tensor(images).score_B})
    return len(found_N) / (time.monotonic() - began)


def rate_of_score(run, images, count):
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        assert score(Options(detector=str(run), images=str(images), out=Path(folder, "s.parquet"))) == 0
        return count / (time.monotonic() - began)


def load(port, payloads, requests, clients):
    """Answered requests a second, and the times of all, in ms."""
    took_ms, rest, lock = [], iter(range(requests)), threading.Lock()

    def work():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                number = next(rest, None)
            if number is None:
                return
            began = time.perf_counter()
            connection.request("POST", "/v1/score", payloads[number % len(payloads)], {"Content-Type": "image/*"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            with lock:
                took_ms.append(1000 * (time.perf_counter() - began))

    began = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return requests / (time.monotonic() - began), np.array(took_ms)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("shards")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=int, default=0, help="requests; 0: no server")
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(threads_of_process())
    accelerator, detector = Accelerator(), bigtrain.load_detector(options.run)
    with tempfile.TemporaryDirectory() as place:
        every, few = ShardSet(options.shards), Path(place, "files")
        few.mkdir()
        sample_N = np.arange(min(options.images, len(every)))
        payloads = every.read(sample_N.tolist())
        for number, payload in enumerate(payloads):
            (few / f"{number:06d}.jpg").write_bytes(payload)
        ratios = []
        for turn in range(options.rounds):
            pair = [
                lambda: rate_of_run(accelerator, detector, every, sample_N),
                lambda: rate_of_score(options.run, few, len(sample_N)),
            ]
            rates = [pair[0](), pair[1]()] if turn % 2 == 0 else [pair[1](), pair[0]()][::-1]
            ratios.append(rates[1] / rates[0])
            print(f"run {rates[0]:.4g} images/s, score {rates[1]:.4g}: {ratios[-1]:.3f}", flush=True)
        print(f"score / run: {median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")
        if options.load:
            command = [sys.executable, "-m", "bigtrain.cli", "serve", "--detector", options.run, "--port", "0"]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            port = int(server.stdout.readline().split("//127.0.0.1:")[1].split("/")[0])
            load(port, payloads, options.clients, options.clients)
            ratios = []
            for _ in range(options.rounds):
                rate, took_ms = load(port, payloads, options.load, options.clients)
                ratios.append(rate / rate_of_score(options.run, few, len(sample_N)))
                said = ", ".join(f"p{q} {np.percentile(took_ms, q):.0f} ms" for q in (50, 99))
                print(f"serve {rate:.4g} images/s, {said}: {ratios[-1]:.3f} of score", flush=True)
            print(f"serve / score: {median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})")
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
