"""`fadeformer serve`: serve a packaged model over HTTP to untrusted clients."""

from __future__ import annotations

import argparse
import logging
import sys

from fadeformer.errors import UserError
from pipelines.registry import package

MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add model, address and request limits."""
    parser.add_argument("model", help="models:/NAME@champion, models:/NAME/VERSION, or the folder of a package")
    parser.add_argument("--port", type=int, default=5001)
    parser.add_argument("--host", default="127.0.0.1", help="default: only this machine; 0.0.0.0: also the network")
    parser.add_argument("--max-mebibytes", type=int, default=32, help="size limit of a request (default: 32)")
    parser.add_argument("--max-images", type=int, default=256, help="images per request (default: 256)")
    parser.add_argument("--max-pixels", type=int, help="pixels per image (default: 25,000,000, from the package)")


def run(arguments: argparse.Namespace) -> str:
    """Serve until a signal stops the server."""
    import uvicorn

    from pipelines.serving import http

    limits = (arguments.max_mebibytes, arguments.max_images, arguments.max_pixels)
    if any(limit is not None and limit < 1 for limit in limits):
        raise UserError("--max-mebibytes, --max-images and --max-pixels must be 1 or more")
    folder = package.fetch_package(arguments.model)
    for name in [name for name in sys.modules if name.split(".")[0] == "fadeformer"]:
        del sys.modules[name]  # the package contains its own copy
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # its warnings quote requests
    config = {} if arguments.max_pixels is None else {"max_pixels": arguments.max_pixels}
    model = package.load_pyfunc(folder, config)
    app = http.create_app(model, max_bytes=arguments.max_mebibytes * MEBIBYTE, max_images=arguments.max_images)
    print(f"serve: {arguments.model} at http://{arguments.host}:{arguments.port}/invocations", flush=True)
    uvicorn.run(
        app, host=arguments.host, port=arguments.port, access_log=False, log_level="warning", server_header=False
    )
    return "stopped"
