"""The server on Ray Serve, as docs/scaling.md shows it: two replicas on this machine, asked over HTTP."""

from __future__ import annotations

import collections
import json
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from sdkd.serve import create_app

BUNDLE, PORT = os.environ["BUNDLE"], int(os.environ["PORT"])
REQUESTS = 12


def build() -> FastAPI:
    return create_app([f"small={BUNDLE}"], target="onnxruntime", memory_gb=4)


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(build)
class Images:
    pass


def ask(seed: int) -> dict[str, Any]:
    body = {"prompt": "a cat", "seed": seed, "steps": 2, "width": 32, "height": 32}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/api/images", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=240) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def drawn() -> dict[str, float]:
    """Images that the replica that answers has drawn."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {"images": sum(float(line.split()[-1]) for line in lines if line.startswith("sdkd_images_total"))}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Images.bind())
    with ThreadPoolExecutor(6) as pool:
        images = [answer["images"][0] for answer in pool.map(ask, range(REQUESTS))]
    counts = collections.Counter(drawn()["images"] for _ in range(40))
    print(json.dumps({"images": images, "counts": sorted(counts)}), flush=True)
    serve.shutdown()
    ray.shutdown()
