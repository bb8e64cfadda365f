"""Install, load and serve a model package in a virtual environment with only its requirements.txt.

    python benchmarks/clean_environment.py PACKAGE [--keep FOLDER]

PACKAGE is the folder of a package, such as `mlruns/artifacts/models/m-.../artifacts`. The script creates a virtual
environment, installs the requirements with pip and copies the package next to it. A process without this project and
its environment loads the package and predicts its input example; then `mlflow models serve` serves it. Prints the time
of each step, the installed size, installed distributions that loading must not need, and the difference to the scores
in this environment. The exit status is 1 on any failure. Takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

import mlflow

UNWANTED = ("mlflow", "dvc", "prefect", "great_expectations", "matplotlib", "captum", "scikit-learn")
LOAD = """
import json, sys, time
start = time.perf_counter()
import mlflow
model = mlflow.pyfunc.load_model("package")
table = model.predict(model.input_example)
import fadeformer
assert fadeformer.__file__.startswith(sys.argv[1]), fadeformer.__file__
print(json.dumps({"seconds": time.perf_counter() - start, "scores": table.filter(like="probability.").values.tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--keep", type=Path, help="create the environment in this folder and keep it")
    args = parser.parse_args()
    example = json.loads((args.package / "serving_input_example.json").read_text())
    model = mlflow.pyfunc.load_model(str(args.package))
    expected = model.predict(model.input_example).filter(like="probability.").to_numpy().tolist()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        package = folder / "package"
        shutil.copytree(args.package, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        python = folder / "environment" / "bin" / "python"
        environment = {
            "PATH": os.pathsep.join([str(python.parent), "/usr/bin", "/bin"]), "HOME": str(folder),
            "MLFLOW_DISABLE_TELEMETRY": "true", **{k: v for k, v in os.environ.items() if k.startswith("PIP_")},
        }  # fmt: skip
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "-r", str(package / "requirements.txt")], check=True)
        print(f"installed in {time.perf_counter() - start:.0f} s")
        installed = json.loads(subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True).stdout)
        names = {row["name"].lower() for row in installed}
        unwanted = [name for name in UNWANTED if name in names]
        size = sum(file.stat().st_size for file in python.parents[1].rglob("*") if file.is_file())
        print(f"{len(names)} distributions, {size / 1e9:.1f} GB; unwanted among them: {', '.join(unwanted) or 'none'}")
        command = [str(python), "-c", LOAD, str(folder)]
        process = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        loaded = json.loads(process.stdout.splitlines()[-1])
        print(f"loaded and predicted in {loaded['seconds']:.1f} s; warnings: {process.stderr.strip() or 'none'}")
        served = _serve_and_predict(folder, environment, example)
        print(f"scores: here {expected}, loaded {loaded['scores']}, served {served}")
        flat = [[value for row in rows for value in row] for rows in (expected, loaded["scores"], served)]
        difference = max(abs(a - b) for other in flat[1:] for a, b in zip(flat[0], other, strict=True))
        print(f"largest difference {difference:.1g}")
        sys.exit(bool(unwanted) or difference > 1e-5)


def _serve_and_predict(folder: Path, environment: dict[str, str], example: dict[str, object]) -> list[list[float]]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", "package", "--env-manager", "local", "-h", "127.0.0.1", "-p"]
    log = folder / "serve.log"
    start = time.perf_counter()
    executable = str(Path(environment["PATH"].split(os.pathsep)[0]) / command[0])
    with log.open("w") as file:
        process = subprocess.Popen(
            [executable, *command[1:], str(port)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.perf_counter() - start > 180:
                    sys.exit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.3)
        print(f"served after {time.perf_counter() - start:.1f} s")
        request = Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(example).encode(), {"content-type": "application/json"}
        )
        with urlopen(request, timeout=60) as response:  # noqa: S310
            rows = json.load(response)["predictions"]
        return [[value for name, value in row.items() if name.startswith("probability.")] for row in rows]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    main()
