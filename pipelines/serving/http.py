"""MLflow's scoring app behind a guard, for requests from strangers: `fadeformer serve`.

MLflow's app has no limit for a body, puts tracebacks with paths and what was sent into its answers, and answers some
malformed requests with status 500. The guard reads the body up to a limit, takes only what the model takes, and tells
in its own words what is wrong. Neither it nor anything below it logs what was sent.
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
    """A request that is not answered; `status` is HTTP's, and the text says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def create_app(model: PyFuncModel, *, max_bytes: int, max_images: int) -> App:
    """The guarded app of a package.

    Args:
        model: as `mlflow.pyfunc.load_model` gives it.
        max_bytes: of a request's body.
        max_images: in a request.
    """
    scoring = scoring_server.init(model)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await scoring(scope, receive, send)
        elif scope["type"] == "http":
            try:
                status, body = await _handle_request(scoring, scope, receive, max_bytes, max_images)
            except RequestError as refusal:
                status, body = refusal.status, json.dumps({"error": str(refusal)}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})

    return guarded


async def _handle_request(
    scoring: App, scope: Scope, receive: Receive, max_bytes: int, max_images: int
) -> tuple[int, bytes]:
    method = ALLOWED_METHODS.get(scope["path"])
    if method is None:
        raise RequestError(404, f"there is nothing here; there are {', '.join(ALLOWED_METHODS)}")
    if scope["method"] != method:
        raise RequestError(405, f"this address takes {method}")
    headers = dict(scope["headers"])
    body = await _read_body(receive, max_bytes)
    if method == "POST":
        body = _normalize_body(headers.get(b"content-type", b"").decode("latin-1"), body, max_images)
    inner = {
        **scope, "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    status, answer = await _call_app(scoring, inner, body)
    if status < 400:
        return status, answer
    told = json.loads(answer) if answer.startswith(b"{") else {}
    if "reason" in told:  # of `pyfunc_model.py`
        raise RequestError(status, told["reason"])
    if status == 504:
        raise RequestError(status, "it took too long; send fewer or smaller images")
    if status >= 500 or "stack_trace" in told:  # MLflow calls the model's own errors the sender's
        log.error("a request ended with an error of the server's own")
        raise RequestError(500, "an error of the server's own")
    raise RequestError(status, f"the images have no common form; {USAGE}")


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts, length, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "the request was broken off")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > limit:
            raise RequestError(413, f"the request has more than {limit:,} bytes; send fewer or smaller images")
        more = message.get("more_body", False)
    return b"".join(parts)


def _normalize_body(content_type: str, body: bytes, max_images: int) -> bytes:
    """The request in the one form in which MLflow's app gets it."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":  # a file as it is
        return json.dumps({"inputs": {"image": [base64.b64encode(body).decode()]}}).encode()
    if kind != "application/json":
        raise RequestError(415, "the content type is neither application/json nor, for one file, that of an image")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not JSON; {USAGE}") from error
    if not isinstance(document, dict) or len(document.keys() - {"params"}) != 1:
        raise RequestError(400, f"the request is not in one form; {USAGE}")
    params = document.pop("params", None) or {}
    if not isinstance(params, dict) or not all(k == "operating_point" and isinstance(params[k], str) for k in params):
        raise RequestError(400, "params has only operating_point, the name of one")
    images = _extract_images(document)
    if len(images) > max_images:
        raise RequestError(413, f"the request has more than {max_images:,} images; send fewer at once")
    return json.dumps({"inputs": {"image": images}, "params": params}).encode()


def _extract_images(document: dict[str, Any]) -> list[Any]:
    (name, given) = next(iter(document.items()))
    if name == "dataframe_split" and isinstance(given, dict):
        if given.get("columns") == ["image"] and given.keys() <= {"columns", "index", "data"}:
            rows = given.get("data")
            if isinstance(rows, list) and all(isinstance(row, list) and len(row) == 1 for row in rows):
                return [row[0] for row in rows]
    elif name in ("dataframe_records", "inputs", "instances"):
        if isinstance(given, dict) and name == "inputs" and given.keys() == {"image"}:
            given = given["image"]
        elif isinstance(given, list) and all(isinstance(row, dict) and row.keys() == {"image"} for row in given):
            given = [row["image"] for row in given]
        elif name == "dataframe_records":
            given = None
        if isinstance(given, list):
            return given
    raise RequestError(400, f"the request is not in a form that is known; {USAGE}")


async def _call_app(scoring: App, scope: Scope, body: bytes) -> tuple[int, bytes]:
    """Status and body of an app's answer."""
    sent: list[MutableMapping[str, Any]] = []
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> MutableMapping[str, Any]:
        return next(given, {"type": "http.disconnect"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    try:
        await scoring(scope, receive, send)
    except Exception as error:  # what it is must not reach the sender, and may hold what was sent
        log.error("a request ended with %s", type(error).__name__)
        raise RequestError(500, "an error of the server's own") from None
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
