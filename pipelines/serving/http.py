"""ASGI wrapper around MLflow's scoring app that validates requests of untrusted clients: `fadeformer serve`.

MLflow's app has no size limit, returns tracebacks with paths and request data, and responds to some malformed requests
with status 500. The wrapper limits bytes and images of a request (defaults: pipelines/cli/serve.py), accepts only
inputs that the model supports, and returns its own error messages; the model limits the pixels of an image
(pipelines/registry/pyfunc_model.py). Request data are never logged.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mlflow.pyfunc import PyFuncModel, scoring_server

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ALLOWED_METHODS = {"/ping": "GET", "/health": "GET", "/version": "GET", "/invocations": "POST"}
USAGE = (
    'send {"inputs": {"image": [...]}} or {"dataframe_records": [{"image": ...}, ...]}, each image as base64 of a file'
)
log = logging.getLogger(__name__)


class RequestError(Exception):
    """A rejected request, with an HTTP `status` and a reason for the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def create_app(model: PyFuncModel, *, max_bytes: int, max_images: int) -> App:
    """Create the ASGI app of a packaged model.

    Args:
        model: Model from `mlflow.pyfunc.load_model`.
        max_bytes: Maximum size of a request body.
        max_images: Maximum number of images in a request.
    """
    scoring = scoring_server.init(model)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await scoring(scope, receive, send)
        elif scope["type"] == "http":
            try:
                status, body = await _handle_request(scoring, scope, receive, max_bytes, max_images)
            except RequestError as error:
                status, body = error.status, json.dumps({"error": str(error)}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})

    return app


async def _handle_request(
    scoring: App, scope: Scope, receive: Receive, max_bytes: int, max_images: int
) -> tuple[int, bytes]:
    method = ALLOWED_METHODS.get(scope["path"])
    if method is None:
        raise RequestError(404, f"no such path; the paths are {', '.join(ALLOWED_METHODS)}")
    if scope["method"] != method:
        raise RequestError(405, f"this path accepts only {method}")
    headers = dict(scope["headers"])
    body = await _read_body(receive, max_bytes)
    if method == "POST":
        body = _normalize_body(headers.get(b"content-type", b"").decode("latin-1"), body, max_images)
    inner_scope = {
        **scope, "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    status, response = await _call_app(scoring, inner_scope, body)
    if status < 400:
        return status, response
    details = json.loads(response) if response.startswith(b"{") else {}
    if "reason" in details:  # set by pyfunc_model.py
        raise RequestError(status, details["reason"])
    if status == 504:
        raise RequestError(status, "timed out; send fewer or smaller images")
    if status >= 500 or "stack_trace" in details:  # MLflow reports errors of the model as errors of the client
        log.error("a request failed with an internal error")
        raise RequestError(500, "internal server error")
    raise RequestError(status, f"the images differ in shape; {USAGE}")


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts, length, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "the request was interrupted")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > limit:
            raise RequestError(413, f"the request has more than {limit:,} bytes; send fewer or smaller images")
        more = message.get("more_body", False)
    return b"".join(parts)


def _normalize_body(content_type: str, body: bytes, max_images: int) -> bytes:
    """Convert a request to the only form that is passed to MLflow's app."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("image/") or media_type == "application/octet-stream":  # one image file
        return json.dumps({"inputs": {"image": [base64.b64encode(body).decode()]}}).encode()
    if media_type != "application/json":
        raise RequestError(415, "the content type must be application/json or, for one file, that of an image")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not JSON; {USAGE}") from error
    if not isinstance(document, dict) or len(document.keys() - {"params"}) != 1:
        raise RequestError(400, f"the request must have one of the supported formats; {USAGE}")
    params = document.pop("params", None) or {}
    if not isinstance(params, dict) or not all(
        key == "operating_point" and isinstance(value, str) for key, value in params.items()
    ):
        raise RequestError(400, "params can contain only operating_point, a name")
    images = _extract_images(document)
    if len(images) > max_images:
        raise RequestError(413, f"the request has more than {max_images:,} images; send fewer per request")
    return json.dumps({"inputs": {"image": images}, "params": params}).encode()


def _extract_images(document: dict[str, Any]) -> list[Any]:
    name, content = next(iter(document.items()))
    if name == "dataframe_split" and isinstance(content, dict):
        if content.get("columns") == ["image"] and content.keys() <= {"columns", "index", "data"}:
            rows = content.get("data")
            if isinstance(rows, list) and all(isinstance(row, list) and len(row) == 1 for row in rows):
                return [row[0] for row in rows]
    elif name in ("dataframe_records", "inputs", "instances"):
        if isinstance(content, dict) and name == "inputs" and content.keys() == {"image"}:
            content = content["image"]
        elif isinstance(content, list) and all(isinstance(row, dict) and row.keys() == {"image"} for row in content):
            content = [row["image"] for row in content]
        elif name == "dataframe_records":
            content = None
        if isinstance(content, list):
            return content
    raise RequestError(400, f"unsupported request format; {USAGE}")


async def _call_app(scoring: App, scope: Scope, body: bytes) -> tuple[int, bytes]:
    """Call an ASGI app; return the status and body of its response."""
    sent: list[MutableMapping[str, Any]] = []
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> MutableMapping[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    try:
        await scoring(scope, receive, send)
    except Exception as error:  # its text can contain request data, so neither log nor return it
        log.error("a request failed with %s", type(error).__name__)
        raise RequestError(500, "internal server error") from None
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
