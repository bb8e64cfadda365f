"""`fadeformer serve`: a packaged model over HTTP, for requests from strangers."""

from __future__ import annotations

import argparse
import logging
import sys

from fadeformer.errors import UserError
from pipelines.registry import package

MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and what a request may hold."""
    parser.add_argument("model", help="models:/NAME@champion, models:/NAME/VERSION, or the folder of a package")
    parser.add_argument("--port", type=int, default=5001)
    parser.add_argument("--host", default="127.0.0.1", help="this machine alone by default; 0.0.0.0: the network too")
    parser.add_argument("--max-mebibytes", type=int, default=32, help="of a request")
    parser.add_argument("--max-images", type=int, default=256, help="in a request")
    parser.add_argument("--max-pixels", type=int, help="of an image; by default what the package says, 25,000,000")


def run(arguments: argparse.Namespace) -> str:
    """Serves until a signal ends it."""
    import uvicorn

    from pipelines.serving import http

    limits = (arguments.max_mebibytes, arguments.max_images, arguments.max_pixels)
    if any(limit is not None and limit < 1 for limit in limits):
        raise UserError("--max-mebibytes, --max-images and --max-pixels are whole numbers above 0")
    folder = package.fetch_package(arguments.model)
    for name in [name for name in sys.modules if name.split(".")[0] == "fadeformer"]:
        del sys.modules[name]  # the package brings its own
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # its warnings quote what was sent
    config = {} if arguments.max_pixels is None else {"max_pixels": arguments.max_pixels}
    model = package.load_pyfunc(folder, config)
    app = http.create_app(model, max_bytes=arguments.max_mebibytes * MEBIBYTE, max_images=arguments.max_images)
    print(f"serve: {arguments.model} at http://{arguments.host}:{arguments.port}/invocations", flush=True)
    uvicorn.run(
        app, host=arguments.host, port=arguments.port, access_log=False, log_level="warning", server_header=False
    )
    return "ended"
