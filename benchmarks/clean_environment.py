"""Does a package load and serve where only its own requirements.txt is installed?

    python benchmarks/clean_environment.py PACKAGE [--keep FOLDER]

PACKAGE is the folder of a package, as `mlruns/artifacts/models/m-.../artifacts`. A virtual environment is made, its
requirements are installed into it by pip, and the package is copied beside it. There it is loaded in a process that has
neither this project nor its environment, predicts its own input example, and is served by `mlflow models serve`. Prints
how long each takes, how much is installed, what this has that loading must not need, and whether the scores are those
that the package gives here. The exit status is 1 if anything is amiss. Takes minutes and gigabytes.
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
began = time.perf_counter()
import mlflow
model = mlflow.pyfunc.load_model("package")
found = model.predict(model.input_example)
import fadeformer
assert fadeformer.__file__.startswith(sys.argv[1]), fadeformer.__file__
print(json.dumps({"seconds": time.perf_counter() - began, "scores": found.filter(like="probability.").values.tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--keep", type=Path, help="make the environment here and leave it")
    arguments = parser.parse_args()
    example = json.loads((arguments.package / "serving_input_example.json").read_text())
    model = mlflow.pyfunc.load_model(str(arguments.package))
    expected = model.predict(model.input_example).filter(like="probability.").to_numpy().tolist()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        package = folder / "package"
        shutil.copytree(arguments.package, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        python = folder / "environment" / "bin" / "python"
        environment = {
            "PATH": os.pathsep.join([str(python.parent), "/usr/bin", "/bin"]), "HOME": str(folder),
            "MLFLOW_DISABLE_TELEMETRY": "true", **{k: v for k, v in os.environ.items() if k.startswith("PIP_")},
        }  # fmt: skip
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "-r", str(package / "requirements.txt")], check=True)
        print(f"installed in {time.perf_counter() - began:.0f} s")
        listed = json.loads(subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True).stdout)
        names = {row["name"].lower() for row in listed}
        unwanted = [name for name in UNWANTED if name in names]
        size = sum(file.stat().st_size for file in python.parents[1].rglob("*") if file.is_file())
        print(f"{len(names)} distributions, {size / 1e9:.1f} GB; unwanted among them: {', '.join(unwanted) or 'none'}")
        command = [str(python), "-c", LOAD, str(folder)]
        loaded = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        told = json.loads(loaded.stdout.splitlines()[-1])
        print(f"loaded and predicted in {told['seconds']:.1f} s; warnings: {loaded.stderr.strip() or 'none'}")
        served = _served(folder, environment, example)
        print(f"scores: here {expected}, loaded {told['scores']}, served {served}")
        flat = [[value for row in rows for value in row] for rows in (expected, told["scores"], served)]
        apart = max(abs(a - b) for other in flat[1:] for a, b in zip(flat[0], other, strict=True))
        print(f"largest difference {apart:.1g}")
        sys.exit(bool(unwanted) or apart > 1e-5)


def _served(folder: Path, environment: dict[str, str], example: dict[str, object]) -> list[list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "mlflow",
        "models",
        "serve",
        "-m",
        "package",
        "--env-manager",
        "local",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    log = folder / "serve.log"
    began = time.perf_counter()
    executable = str(Path(environment["PATH"].split(os.pathsep)[0]) / command[0])
    with log.open("w") as file:
        process = subprocess.Popen(
            [executable, *command[1:]], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.perf_counter() - began > 180:
                    sys.exit(f"the server did not come up:\n{log.read_text()}")
                time.sleep(0.3)
        print(f"served after {time.perf_counter() - began:.1f} s")
        request = Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(example).encode(), {"content-type": "application/json"}
        )
        with urlopen(request, timeout=60) as answer:  # noqa: S310
            rows = json.load(answer)["predictions"]
        return [[value for name, value in row.items() if name.startswith("probability.")] for row in rows]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    main()
