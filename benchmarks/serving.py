"""How fast is a served package beside a hand-written server of the same network?

    python benchmarks/serving.py PACKAGE [--seconds 10]

Both run on this machine, one after the other: `fadeformer serve`, and the least that FastAPI needs to decode base64 of
PNGs, run the network and answer with scores. Requests of one image come from 4 connections at once, requests of 32
images from 2. Prints median and 99th percentile of the time for a request, images a second, and the ratio of the two
servers. Both servers and the load share the processors, so the ratios mean more than the numbers.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import urllib3
from PIL import Image

from fadeformer.io.atomic import read_json
from pipelines.registry import package

LOADS = ((1, 4), (32, 2))  # images in a request, connections
# It knows the network's own size alone, no limits, no operating points, and gives scores as a list.
PLAIN = """
import base64, io, sys
from pathlib import Path
import numpy as np, torch, uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from fadeformer.io.atomic import read_json
from fadeformer.inference.classifier import Classifier
folder = Path(sys.argv[1])
classifier = Classifier(read_json(folder / "model.json"), folder / "weights.safetensors", device=torch.device("cpu"))
app = FastAPI()
def score(texts):
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in texts]
    return classifier.scores(np.stack(pixels).reshape(len(pixels), *pixels[0].shape[:2], -1), 256).tolist()
@app.post("/invocations")
async def invocations(request: Request):
    document = await request.json()
    return {"predictions": await run_in_threadpool(score, document["inputs"]["image"])}
@app.get("/ping")
def ping(): return {}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")
"""


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """A server that answers."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib3.request("GET", f"http://127.0.0.1:{port}/ping", retries=False)
                break
            except urllib3.exceptions.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{command[:3]} did not come up")
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def load(port: int, body: bytes, connections: int, seconds: float) -> list[float]:
    """Seconds that each request took."""
    pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=connections)

    def ask() -> float:
        began = time.perf_counter()
        answer = pool.request("POST", "/invocations", body=body, headers={"content-type": "application/json"})
        assert answer.status == 200, answer.data
        return time.perf_counter() - began

    for _ in range(5):
        ask()
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < end:
            times.append(ask())

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    data = package.find_data_folder(arguments.package)
    wanted = read_json(data / "model.json")["input"]
    shape = (wanted["image_size"], wanted["image_size"], wanted["channels"])
    draw = np.random.default_rng(0)
    texts = []
    for _ in range(32):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8).squeeze()).save(buffer, "PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain.py"
        plain.write_text(PLAIN)
        served = [sys.executable, "-c", "from pipelines.cli.main import main; main()", "serve", str(arguments.package)]
        commands = {
            "plain": [sys.executable, str(plain), str(data), str(port)], "served": [*served, "--port", str(port)],
        }  # fmt: skip
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        rates: dict[tuple[str, int], float] = {}
        print(f"{'server':8}{'images':>8}{'median ms':>12}{'p99 ms':>10}{'images/s':>10}")
        for name, command in commands.items():
            with server(command, port):
                for images, connections in LOADS:
                    body = json.dumps({"inputs": {"image": texts[:images]}}).encode()
                    times = 1000 * np.array(load(port, body, connections, arguments.seconds))
                    rates[name, images] = len(times) * images / arguments.seconds
                    median, p99 = np.percentile(times, [50, 99])
                    print(f"{name:8}{images:8}{median:12.1f}{p99:10.1f}{rates[name, images]:10.0f}", flush=True)
    for images, _ in LOADS:
        print(f"served / plain, requests of {images}: {rates['served', images] / rates['plain', images]:.2f}")


if __name__ == "__main__":
    main()
