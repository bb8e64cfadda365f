"""Throughput and latency of `fadeformer serve`, against a minimal FastAPI server of the same model.

    python benchmarks/serving.py PACKAGE [--seconds 10]

Both servers run on this machine, one after the other; the baseline only decodes base64-encoded PNGs, runs the model
and returns scores. Requests of one image come from 4 concurrent connections, requests of 32 images from 2. Prints the
median and 99th percentile of the latency, images per second, and the ratio of the two servers. Servers and clients
share the processors, so the ratios are more meaningful than the absolute numbers.
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
from pipelines.environment import configure_environment

if __name__ == "__main__":  # before MLflow is imported, to disable its telemetry
    configure_environment()

from pipelines.registry import package

LOADS = ((1, 4), (32, 2))  # images in a request, connections
# Accepts images of the model's input size only, has no limits and no operating points, and returns scores as a list.
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
    return classifier.predict_proba(np.stack(pixels).reshape(len(pixels), *pixels[0].shape[:2], -1), 256).tolist()
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
    """Start a server and wait until it responds."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib3.request("GET", f"http://127.0.0.1:{port}/ping", retries=False)
                break
            except urllib3.exceptions.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{command[:3]} did not start")
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def measure_latencies(port: int, body: bytes, connections: int, seconds: float) -> list[float]:
    """Return the latency of each request in seconds."""
    pool = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=connections)

    def send_request() -> float:
        start = time.perf_counter()
        response = pool.request("POST", "/invocations", body=body, headers={"content-type": "application/json"})
        assert response.status == 200, response.data
        return time.perf_counter() - start

    for _ in range(5):
        send_request()
    times: list[float] = []
    end = time.perf_counter() + seconds

    def send_requests() -> None:
        while time.perf_counter() < end:
            times.append(send_request())

    threads = [threading.Thread(target=send_requests) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    data = package.find_data_folder(args.package)
    input_size = read_json(data / "model.json")["input"]
    shape = (input_size["image_size"], input_size["image_size"], input_size["channels"])
    random = np.random.default_rng(0)
    texts = []
    for _ in range(32):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8).squeeze()).save(buffer, "PNG")
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain.py"
        plain.write_text(PLAIN)
        serve_command = [
            sys.executable,
            "-c",
            "from pipelines.cli.main import main; main()",
            "serve",
            str(args.package),
        ]
        commands = {
            "plain": [sys.executable, str(plain), str(data), str(port)],
            "served": [*serve_command, "--port", str(port)],
        }
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        rates: dict[tuple[str, int], float] = {}
        print(f"{'server':8}{'images':>8}{'median ms':>12}{'p99 ms':>10}{'images/s':>10}")
        for name, command in commands.items():
            with server(command, port):
                for images, connections in LOADS:
                    body = json.dumps({"inputs": {"image": texts[:images]}}).encode()
                    times = 1000 * np.array(measure_latencies(port, body, connections, args.seconds))
                    rates[name, images] = len(times) * images / args.seconds
                    median, p99 = np.percentile(times, [50, 99])
                    print(f"{name:8}{images:8}{median:12.1f}{p99:10.1f}{rates[name, images]:10.0f}", flush=True)
    for images, _ in LOADS:
        print(f"served / plain, requests of {images}: {rates['served', images] / rates['plain', images]:.2f}")


if __name__ == "__main__":
    main()
