"""Download files over HTTP: several at once, resumed after an interruption, and verified.

A file is written to `NAME.part` and renamed once it is complete and its checksum is right. `NAME.part.json` holds the
address and the version (ETag or date) of its bytes, so that a later run requests only the rest of that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import requests
from filelock import FileLock, Timeout
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError
from urllib3.util import Retry

from fadeformer.errors import TransientError, UserError
from fadeformer.io.atomic import DISK_FULL_ERRNOS, check_free_space, format_bytes, read_json, write_json

TIMEOUT = 30.0  # seconds without data after which a connection counts as lost
CHUNK_BYTES = 2**16  # bytes; a kill loses no more than one
IDENTITY_HEADERS = {"Accept-Encoding": "identity"}  # byte ranges refer to the encoded body: request it uncompressed
NOT_FOUND_STATUS = (404, 410)
TRANSIENT_STATUS = (408, 425, 429, *range(500, 600))  # worth retrying
RETRY = Retry(
    8, backoff_factor=1, backoff_max=60, backoff_jitter=1, retry_after_max=600, status_forcelist=TRANSIENT_STATUS,
    raise_on_status=False,
)  # fmt: skip
HEAD_RETRY = RETRY.new(
    total=2, status_forcelist=(), respect_retry_after_header=False
)  # report a missing connection soon


class RemoteFile(NamedTuple):
    """A file to download: its URL, local name, and published checksum as ("md5", "a8b0...")."""

    url: str
    name: str
    checksum: tuple[str, str] | None = None


class DownloadedFile(NamedTuple):
    """A complete and verified file."""

    path: Path
    sha256: str
    size: int


class RemoteFileNotFoundError(UserError):
    """The server has no such file (status 404 or 410)."""


def fetch_files(
    files: Sequence[RemoteFile], folder: Path, *, hint: str, max_workers: int = 4
) -> dict[str, DownloadedFile]:
    """Download files into a folder; complete files of an earlier call are only verified.

    Args:
        files: files to download, with distinct names.
        folder: destination folder, also for partial files.
        hint: advice to the user if a download fails; ends the error message.
        max_workers: maximum number of simultaneous downloads.

    Returns:
        The files by name.

    Raises:
        UserError: a file cannot be downloaded, its checksum is wrong, the disk is full, or another process downloads
            into the folder. Partial files are kept for the next call.
        RemoteFileNotFoundError: a server has no such file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0), ThreadPool(max_workers) as pool:
            return _fetch_all([_Download(file, folder, hint, stop) for file in files], folder, pool)
    except Timeout as error:
        raise TransientError(
            f"{folder}: another process is downloading into this folder; wait until it has finished, then run again"
        ) from error
    finally:
        stop.set()  # the threads of the pool are daemons: they stop at their next chunk or with the process


def _fetch_all(downloads: Sequence[_Download], folder: Path, pool: ThreadPool) -> dict[str, DownloadedFile]:
    complete = {file.path.name: file for file in pool.map(_Download.find_complete, downloads) if file}
    missing = [download for download in downloads if download.file.name not in complete]
    if missing:
        complete |= _fetch_missing(missing, folder, pool)
    return {download.file.name: complete[download.file.name] for download in downloads}


def _fetch_missing(missing: Sequence[_Download], folder: Path, pool: ThreadPool) -> dict[str, DownloadedFile]:
    """Download files with one progress bar, after checking that the disk has space for all of them."""
    complete: dict[str, DownloadedFile] = {}
    lengths = [download.content_length() for download in missing]
    received = sum(download.received for download in missing)
    check_free_space(folder, sum(filter(None, lengths)) - received, "the download")
    name = missing[0].file.name if len(missing) == 1 else f"{len(missing)} files"
    total = None if None in lengths else sum(filter(None, lengths))
    with tqdm(desc=name, total=total, initial=received, unit="B", unit_scale=True, disable=None) as bar:
        results = pool.imap_unordered(_Download.run, missing)
        while len(complete) < len(missing):
            with contextlib.suppress(multiprocessing.TimeoutError):
                file = results.next(timeout=0.2)
                complete[file.path.name] = file
            bar.update(sum(download.received for download in missing) - bar.n)
    return complete


class _Download:
    """Download of one file into a folder; `received` counts its bytes on disk."""

    def __init__(self, file: RemoteFile, folder: Path, hint: str, stop: threading.Event) -> None:
        self.file = file
        self.hint = hint
        self.stop = stop
        self.path = folder / file.name
        self.partial_path = folder / f"{file.name}.part"
        self.state_path = folder / f"{file.name}.part.json"
        self.algorithms = {"sha256", file.checksum[0] if file.checksum else "sha256"}
        self.received = 0

    def find_complete(self) -> DownloadedFile | None:
        """Return the file if it exists and its checksum matches, else None."""
        if self.path.is_file():
            digests = _compute_digests(self.path, self.algorithms)
            if self._checksum_mismatch(digests) is None:
                return DownloadedFile(self.path, digests["sha256"].hexdigest(), self.path.stat().st_size)
            _print_message(f"{self.path}: checksum mismatch; downloading it again")
        self.received, _ = self._partial_state()
        return None

    def content_length(self) -> int | None:
        """Get the Content-Length with a HEAD request; None if the server sends none."""
        with _session(HEAD_RETRY) as session:
            try:
                response = session.head(self.file.url, headers=IDENTITY_HEADERS, allow_redirects=True, timeout=TIMEOUT)
            except requests.RequestException as error:
                raise self._request_error(error) from error
        length = response.headers.get("Content-Length", "")
        return int(length) if response.status_code == 200 and length.isdecimal() else None

    def run(self) -> DownloadedFile:
        """Download the file.

        Raises:
            UserError: the file cannot be downloaded, its checksum is wrong, or the disk is full.
            CancelledError: `stop` was set.
        """
        try:
            digests = self._receive_with_retries()
            if wrong := self._checksum_mismatch(digests):
                self._discard()
                raise UserError(f"{self.file.url}: {wrong}; {self.hint}")
            with self.partial_path.open("ab") as part:
                os.fsync(part.fileno())  # otherwise a power failure could leave a renamed but empty file
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            raise UserError(
                f"{self.partial_path}: the disk is full; free some space, then run again: the partial file is kept"
            ) from error
        self.partial_path.replace(self.path)
        self.state_path.unlink()
        return DownloadedFile(self.path, digests["sha256"].hexdigest(), self.received)

    def _receive_with_retries(self) -> dict[str, Any]:
        """Request the missing bytes, with retries, until the file is complete; return its digests."""
        retry = RETRY
        with _session(RETRY) as session:
            while True:
                received = self.received
                try:
                    return self._request_remaining(session)
                except HTTPError as error:
                    timed_out = isinstance(error, ReadTimeoutError)
                    reason = f"no data for {TIMEOUT:g} s" if timed_out else "connection lost"
                    retry = RETRY if self.received > received else retry
                    try:
                        retry = retry.increment("GET", self.file.url, error=error)
                    except MaxRetryError:
                        raise self._error(reason, TransientError) from error
                _print_message(f"{self.file.name}: {reason}; trying again")
                retry.sleep()

    def _request_remaining(self, session: requests.Session) -> dict[str, Any]:
        """Request the missing bytes, append them to the partial file and return the digests of the file."""
        offset, version = self._partial_state()
        digests = _compute_digests(self.partial_path, self.algorithms)
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if offset and version:
            headers["If-Range"] = version
        try:
            response = session.get(self.file.url, headers=IDENTITY_HEADERS | headers, stream=True, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise self._request_error(error) from error
        with response:
            resumed = response.status_code == 206
            if offset and (
                response.status_code == 416 or (resumed and not _is_continuation(response, offset, version))
            ):
                self._discard()
                return self._request_remaining(session)
            self._check_response(response, (200, 206) if offset else (200,))
            if not resumed:
                self._discard()
                write_json(self.state_path, [self.file.url, _resource_version(response)])
                digests = _compute_digests(self.partial_path, self.algorithms)
            with self.partial_path.open("ab") as part:
                for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                    if self.stop.is_set():
                        raise CancelledError
                    part.write(chunk)
                    self.received += len(chunk)
                    for digest in digests.values():
                        digest.update(chunk)
        return digests

    def _check_response(self, response: requests.Response, expected: Sequence[int]) -> None:
        """Raise UserError if a response is not the file."""
        status = f"{response.status_code} {response.reason}"
        if response.status_code in NOT_FOUND_STATUS:
            raise self._error(status, RemoteFileNotFoundError)
        if response.status_code not in expected:
            raise self._error(status, TransientError if response.status_code in TRANSIENT_STATUS else UserError)
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise self._error("the server sent a web page instead of the file")
        has_length = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
        if self.file.checksum is None and not has_length:
            raise self._error("the server sends no Content-Length, so a truncated download could not be detected")

    def _partial_state(self) -> tuple[int, str | None]:
        """Return size and version of the partial file; discard it if a change on the server could not be detected."""
        url = version = None
        if self.state_path.is_file() and self.partial_path.is_file():
            url, version = read_json(self.state_path)
        if url == self.file.url and (version or self.file.checksum):
            return self.partial_path.stat().st_size, version
        self._discard()
        return 0, None

    def _discard(self) -> None:
        self.partial_path.unlink(missing_ok=True)
        self.state_path.unlink(missing_ok=True)
        self.received = 0

    def _checksum_mismatch(self, digests: dict[str, Any]) -> str | None:
        """Describe how the digests differ from the published checksum; None if they match or none is published."""
        if self.file.checksum is None:
            return None
        algorithm, published = self.file.checksum
        digest = digests[algorithm].hexdigest()
        return (
            None
            if digest == published
            else f"{algorithm.upper()} is {digest}, but the published checksum is {published}"
        )

    def _request_error(self, error: requests.RequestException) -> UserError:
        """Convert a failed request into a UserError."""
        if isinstance(error, requests.exceptions.SSLError):
            return self._error("the certificate of the server cannot be verified")
        if isinstance(error, requests.ConnectionError):
            return self._error("no connection", TransientError)
        return self._error(str(error))

    def _error(self, reason: str, error_type: type[UserError] = UserError) -> UserError:
        kept = f"; {format_bytes(self.received)} received so far are kept" if self.received else ""
        return error_type(f"{self.file.url}: cannot be downloaded ({reason}); {self.hint}{kept}")


def _session(retry: Retry) -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _resource_version(response: requests.Response) -> str | None:
    """Return a validator for If-Range: a strong ETag, else Last-Modified (RFC 9110, section 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _is_continuation(response: requests.Response, offset: int, version: str | None) -> bool:
    """Return True if a partial response starts at byte `offset` and, if versions are known, is of the same version."""
    same = version is None or _resource_version(response) in (None, version)
    return same and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _compute_digests(path: Path, algorithms: Iterable[str]) -> dict[str, Any]:
    """Return hashlib objects for the content of a file by algorithm; a missing file counts as empty."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                for digest in digests.values():
                    digest.update(chunk)
    return digests


def _print_message(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # does not break the progress bar
