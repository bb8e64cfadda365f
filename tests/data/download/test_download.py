"""Downloads with a faulty server, network or disk: a file is complete and correct, or does not exist."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tqdm import tqdm

from fadeformer.data.download import download
from fadeformer.data.download.download import RemoteFile, fetch_files
from fadeformer.errors import TransientError, UserError

FILE, OTHER = (np.random.default_rng(seed).bytes(200_000) for seed in (0, 1))
SHA256 = ("sha256", hashlib.sha256(FILE).hexdigest())
NAME = "images.zip"
DATE = "Mon, 01 Jan 2024 00:00:00 GMT"


@dataclass(frozen=True)
class Answer:
    """Response of the server to one request."""

    body: bytes = FILE
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)  # override the default headers; "" omits one
    stop: int | None = None  # the server stops after so many bytes
    stall: bool = False  # and then keeps the connection open without sending, instead of closing it
    ranges: bool = True  # honor Range
    if_range: bool = True  # honor If-Range
    pace: float = 0.0  # seconds before each 5000 bytes


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(self.server.answers[self.path][0], body=False)

    def do_GET(self) -> None:
        answers = self.server.answers[self.path]
        self.server.ranges.append(self.headers["Range"])
        assert self.headers["Accept-Encoding"] == "identity"
        assert not (self.headers["If-Range"] or "").startswith("W/")
        with self.server.counting():
            self.answer(answers.pop(0) if len(answers) > 1 else answers[0])

    def answer(self, answer: Answer, *, body: bool = True) -> None:
        content, status = answer.body if answer.status < 300 else b"", answer.status
        headers = {"ETag": '"one"', "Last-Modified": DATE, "Content-Type": "application/zip"} | answer.headers
        place = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = not answer.if_range or self.headers["If-Range"] in (None, headers["ETag"], headers["Last-Modified"])
        if status == 200 and place and answer.ranges and same:
            status, start = 206, int(place[1])
            if start >= len(content):
                status, content = 416, b""
            else:
                headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} | headers
                content = content[start:]
        chunked = "Transfer-Encoding" in headers
        length = {} if chunked else {"Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in ({"Connection": "close"} | length | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if body:
            with contextlib.suppress(ConnectionError):  # the client closed the connection
                self.send(answer, content, chunked)

    def send(self, answer: Answer, content: bytes, chunked: bool) -> None:
        for start in range(0, len(content) if answer.stop is None else answer.stop, 5000):
            time.sleep(answer.pace)
            piece = content[start : min(start + 5000, answer.stop or len(content))]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self.server.sent += len(piece)
        if answer.stall:
            self.connection.recv(1)  # until the client closes the connection
        elif chunked and answer.stop is None:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        """Suppress the access log."""


class Server(http.server.ThreadingHTTPServer):
    """Server with a list of answers per URL, one per request; the last answer is repeated."""

    daemon_threads = True
    scheme = "http"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.ranges: list[str | None] = []
        self.sent = self.active = self.max_active = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def publish(self, *answers: Answer, name: str = NAME) -> str:
        path = f"/{len(self.answers)}/{name}"
        self.answers[path] = list(answers)
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}{path}"

    @contextlib.contextmanager
    def counting(self):
        with self.lock:
            self.active += 1
            self.max_active = max(self.max_active, self.active)
        try:
            yield
        finally:
            with self.lock:
                self.active -= 1

    def handle_error(self, *args: object) -> None:
        """Ignore clients that close the connection."""


@pytest.fixture
def server():
    with Server() as running:
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch):
    fast = {"backoff_factor": 0.01, "backoff_jitter": 0}
    monkeypatch.setattr(download, "RETRY", download.RETRY.new(total=3, **fast))
    monkeypatch.setattr(download, "HEAD_RETRY", download.HEAD_RETRY.new(**fast))
    monkeypatch.setattr(download, "TIMEOUT", 0.5)


def get(url: str, folder: Path, *, name: str = NAME, checksum=None) -> Path:
    """Download one file and check that the final name only ever has the complete, correct content."""
    path = folder / name
    try:
        file = fetch_files([RemoteFile(url, name, checksum)], folder, hint="see the README")[name]
    finally:
        assert not path.exists() or path.read_bytes() in (FILE, b"")
        part = folder / f"{name}.part"
        assert not part.exists() or FILE.startswith(part.read_bytes())
    assert file == (path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert [entry.name for entry in folder.iterdir()] == [name]
    return path


NO_VERSION = {"ETag": "", "Last-Modified": ""}
CHUNKED = {"Transfer-Encoding": "chunked"}
GOOD, CUT = Answer(), Answer(stop=60_000)
RANGE = "bytes=60000-"


@pytest.mark.parametrize(
    ("answers", "checksum", "ranges"),
    [
        pytest.param([GOOD], None, [None], id="complete"),
        pytest.param([GOOD], SHA256, [None], id="published checksum"),
        pytest.param([Answer(headers=CHUNKED)], None, [None], id="no length"),
        pytest.param([CUT, GOOD], None, [None, RANGE], id="dropped once"),
        pytest.param([Answer(stop=20_000)], None, [None, *(f"bytes={n}0000-" for n in range(2, 20, 2))],
                     id="repeated connection loss with progress"),
        pytest.param([Answer(stop=60_000, headers=CHUNKED), GOOD], None, [None, RANGE], id="truncated chunks"),
        pytest.param([Answer(stop=60_000, stall=True), GOOD], None, None, id="stalled"),
        pytest.param([Answer(stop=0, stall=True, headers=NO_VERSION), GOOD], None, [None, None], id="no data"),
        pytest.param([CUT, Answer(ranges=False)], None, [None, RANGE], id="ignores Range"),
        pytest.param([Answer(OTHER, headers={"ETag": '"zero"'}, stop=60_000), GOOD], None, [None, RANGE],
                     id="file changed"),
        pytest.param([Answer(OTHER, headers={"ETag": '"zero"'}, stop=60_000), Answer(if_range=False), GOOD], None,
                     [None, RANGE, None], id="file changed, If-Range ignored"),
        pytest.param([Answer(OTHER, headers={"ETag": 'W/"zero"', "Last-Modified": DATE.replace("01", "02")},
                             stop=60_000), Answer(headers={"ETag": 'W/"one"'})], None, [None, RANGE],
                     id="file changed, weak ETag"),
        pytest.param([Answer(OTHER, headers=NO_VERSION, stop=60_000), Answer(headers=NO_VERSION)], None,
                     [None, None], id="file changed, no version"),
        pytest.param([Answer(headers=NO_VERSION, stop=60_000), GOOD], SHA256, [None, RANGE], id="no version, checksum"),
        pytest.param([Answer(status=500), Answer(status=503), Answer(status=408), GOOD], None, [None] * 4, id="500s"),
        pytest.param([Answer(status=429, headers={"Retry-After": "1"}), GOOD], None, [None] * 2, id="429"),
    ],
)  # fmt: skip
def test_download_is_complete_and_correct(server, tmp_path, answers, checksum, ranges):
    get(server.publish(*answers), tmp_path / "downloads", checksum=checksum)
    assert ranges is None or server.ranges == ranges


@pytest.mark.parametrize(
    ("answer", "message", "passing", "requests"),
    [
        (Answer(stop=60_000, ranges=False), r"\(connection lost\).*60.0kB received so far", True, 4),
        (Answer(stop=0, stall=True), r"\(no data for 0.5 s\)", True, 4),
        (Answer(headers={"Content-Length": "250000"}), r"\(connection lost\)", True, 7),
        (Answer(OTHER, headers={"X": "checksum"}), f"SHA256 is {hashlib.sha256(OTHER).hexdigest()}, but", False, 1),
        (Answer(stop=60_000, headers={"Content-Length": ""}), "the server sends no Content-Length", False, 1),
        (Answer(status=404), r"\(404 Not Found\); see the README$", False, 1),
        (Answer(status=204), r"\(204 No Content\)", False, 1),
        (Answer(status=500), r"\(500 Internal Server Error\)", True, 4),
        (
            Answer(b"<html>Log in</html>", headers={"Content-Type": "text/html"}),
            "the server sent a web page instead",
            False,
            1,
        ),
    ],
)
def test_invalid_responses_raise_error(server, tmp_path, answer, message, passing, requests):
    url = server.publish(answer)
    with pytest.raises(UserError, match=message) as error:
        get(url, tmp_path / "downloads", checksum=SHA256 if "X" in answer.headers else None)
    assert str(error.value).startswith(url)
    assert "see the README" in str(error.value)
    assert isinstance(error.value, TransientError) == passing
    assert not (tmp_path / "downloads" / NAME).exists()
    assert len(server.ranges) == requests


def test_next_run_resumes_partial_file(server, tmp_path):
    url = server.publish(Answer(stop=60_000), Answer(status=403), Answer(stop=70_000), Answer(status=403), GOOD)
    for kept in ("60.0kB", "130kB"):
        with pytest.raises(UserError, match=f"403 Forbidden.*{kept} received so far are kept"):
            get(url, tmp_path / "downloads")
    get(url, tmp_path / "downloads")
    assert server.sent == len(FILE)


@pytest.mark.parametrize("missing", ["url", "part", "state"])
def test_partial_file_without_valid_state_is_discarded(server, tmp_path, missing):
    first, second = server.publish(CUT, Answer(status=403)), server.publish(GOOD)
    with pytest.raises(UserError, match="403"):
        get(first, tmp_path)
    if missing != "url":
        server.answers[first.removeprefix(second.rpartition("/1/")[0])] = [GOOD]
        (tmp_path / f"{NAME}{'.part' if missing == 'part' else '.part.json'}").unlink()
    get(second if missing == "url" else first, tmp_path)
    assert server.ranges[-1] is None


def test_corrupt_partial_file_is_discarded(server, tmp_path):
    url = server.publish(CUT, Answer(status=403), GOOD)
    with pytest.raises(UserError, match="403"):
        get(url, tmp_path, checksum=SHA256)
    (tmp_path / f"{NAME}.part").write_bytes(bytes(60_000))
    with pytest.raises(UserError, match="SHA256 is"):
        get(url, tmp_path, checksum=SHA256)
    get(url, tmp_path, checksum=SHA256)


def test_redirects_are_followed_when_resuming(server, tmp_path):
    url = server.publish(Answer(status=302, headers={"Location": server.publish(CUT, GOOD)}))
    get(url, tmp_path)
    assert server.ranges == [None, None, RANGE, RANGE]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/a.zip", r"cannot be downloaded \(no connection\); see the README$"),
        ("gopher://127.0.0.1/a.zip", "No connection adapters"),
    ],
)
def test_unreachable_server_raises_error(tmp_path, url, message):
    with pytest.raises(UserError, match=message):
        get(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_untrusted_certificate_raises_error(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server() as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        running.scheme = "https"
        with pytest.raises(UserError, match="the certificate of the server cannot be verified"):
            get(running.publish(GOOD), tmp_path / "downloads")
        running.shutdown()


def test_complete_file_is_redownloaded_only_if_damaged(server, tmp_path, capsys):
    url = server.publish(GOOD)
    for checksum in (None, SHA256):
        get(url, tmp_path, checksum=checksum)
    assert len(server.ranges) == 1
    (tmp_path / NAME).write_bytes(FILE[:-1])
    get(url, tmp_path, checksum=SHA256)
    assert len(server.ranges) == 2
    assert f"{tmp_path / NAME}: checksum mismatch; downloading it again" in capsys.readouterr().err


def publish_files(server, *names: str, answers=(GOOD,), checksum=None) -> list[RemoteFile]:
    return [RemoteFile(server.publish(*answers, name=name), name, checksum) for name in names]


def test_files_are_downloaded_in_parallel(server, tmp_path):
    files = publish_files(server, *(f"{n}.zip" for n in range(6)), answers=[Answer(pace=0.003)])
    complete = fetch_files(files, tmp_path, hint="", max_workers=2)
    assert list(complete) == [file.name for file in files]
    assert all(file.path.read_bytes() == FILE for file in complete.values())
    assert server.max_active == 2


def test_first_error_stops_others_and_keeps_partial_files(server, tmp_path):
    files = publish_files(server, "a.zip", "b.zip", answers=[Answer(stop=150_000, pace=0.03, stall=True), GOOD])
    bad = publish_files(server, "c.zip", answers=[Answer(OTHER)], checksum=SHA256)
    with pytest.raises(UserError, match="SHA256 is"):
        fetch_files([*files, *bad], tmp_path, hint="")
    assert list(tmp_path.glob("*.zip")) == []
    fetch_files(files, tmp_path, hint="")
    assert all((tmp_path / file.name).read_bytes() == FILE for file in files)


def test_download_folder_is_locked(server, tmp_path):
    url = server.publish(GOOD)
    with FileLock(tmp_path / ".downloads.lock"), pytest.raises(TransientError, match="another process is downloading"):
        get(url, tmp_path / "downloads")
    get(url, tmp_path / "downloads")


def test_insufficient_disk_space_is_detected_before_download(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(390_000))
    with pytest.raises(
        UserError, match="not enough disk space for the download: 400kB are needed, but only 390kB are free"
    ):
        fetch_files(publish_files(server, "a.zip", "b.zip"), tmp_path, hint="")
    assert server.ranges == []
    url = server.publish(CUT, Answer(status=403), GOOD)
    with pytest.raises(UserError, match="403"):
        get(url, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(140_000))  # enough for the rest
    get(url, tmp_path)


def test_full_disk_keeps_partial_file(server, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            room = 50_000 - self.tell()
            if room < len(data):
                super().write(data[:room])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return super().write(data)

    url, opened = server.publish(GOOD), Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda path, *how, **more: (FullDisk if how == ("ab",) else opened)(path, *how, **more)
        )
        with pytest.raises(UserError, match=rf"{NAME}\.part: the disk is full; free some space, then run again"):
            get(url, tmp_path)
    get(url, tmp_path)
    assert server.ranges == [None, "bytes=50000-"]


def test_progress_bar_counts_bytes(server, tmp_path, monkeypatch):
    output = io.StringIO()

    def bar(**arguments) -> tqdm:
        return tqdm(**arguments | {"disable": False, "ascii": True, "file": output, "mininterval": 0})

    monkeypatch.setattr(download, "tqdm", bar)
    monkeypatch.setattr(download, "_print_message", print)
    answers = [Answer(stop=60_000), Answer(ranges=False)]  # the download restarts
    fetch_files(publish_files(server, "a.zip", "b.zip", answers=answers), tmp_path, hint="")
    last = output.getvalue().split("\r")[-1]
    assert re.match(r"2 files: 100%\|#+\| 400k/400k \[\d\d:\d\d<\d\d:\d\d, [\d.]+[kM]?B/s\]", last)


PROGRAM = """
import signal, sys
from pathlib import Path
from fadeformer.data.download import download
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore Ctrl-C
download.TIMEOUT = 300
files = [download.RemoteFile(url, f"{n}.zip") for n, url in enumerate(sys.argv[2:])]
try:
    download.fetch_files(files, Path(sys.argv[1]), hint="")
except KeyboardInterrupt:
    sys.exit("interrupted")
"""
STALL = Answer(stop=2**17, stall=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_download_resumes_with_missing_bytes(server, tmp_path, number):
    urls = [server.publish(STALL, GOOD), server.publish(STALL, GOOD)]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, *urls], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while [path.stat().st_size for path in tmp_path.glob("*.part")] != [2**17] * 2:
        assert time.monotonic() < deadline, "the download did not start"
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)  # a fifth of the download timeout
    assert number == signal.SIGKILL or stderr == "interrupted\n"
    assert list(tmp_path.glob("*.zip")) == []
    server.ranges.clear()
    server.sent = 0
    fetch_files([RemoteFile(url, f"{n}.zip") for n, url in enumerate(urls)], tmp_path, hint="")
    assert server.ranges == ["bytes=131072-"] * 2
    assert server.sent == 2 * (len(FILE) - 2**17)
