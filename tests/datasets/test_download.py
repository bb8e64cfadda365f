"""Whatever a server, a network, a disk or a user does: the right bytes under the final name, or none."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from fadeformer.datasets import download
from fadeformer.datasets.download import Patience, Remote, bring
from fadeformer.errors import UserError

FILE, OTHER = (np.random.default_rng(seed).bytes(200_000) for seed in (0, 1))
SHA256 = ("sha256", hashlib.sha256(FILE).hexdigest())
HASTE = Patience(retries=3, first_wait=0.01, longest_wait=0.02, longest_asked=5, silence=0.5)
NAME = "images.zip"
DATE = "Mon, 01 Jan 2024 00:00:00 GMT"


@dataclass(frozen=True)
class Answer:
    """How the server answers one request."""

    body: bytes = FILE
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)  # replace those it would send; "" leaves one out
    stop: int | None = None  # bytes of this answer after which the server stops,
    how: str = "close"  # in this way: close, reset or stall
    ranges: bool = True  # whether it honours Range,
    if_range: bool = True  # and If-Range
    ends: str = "length"  # how it shows its end: length, chunked or close
    pace: float = 0.0  # seconds before each 5000 bytes


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        answer = self.server.answers[self.path][0]
        self.answer(replace(answer, how="close"), body=False)

    def do_GET(self) -> None:
        answers = self.server.answers[self.path]
        asked = {
            "path": self.path,
            "range": self.headers["Range"],
            "validator": self.headers["If-Range"] or "",
            "coding": self.headers["Accept-Encoding"],
            "sent": 0,
        }
        self.server.asked.append(asked)
        self.asked = asked
        with self.server.counting():
            self.answer(answers.pop(0) if len(answers) > 1 else answers[0])

    def answer(self, answer: Answer, *, body: bool = True) -> None:
        if answer.how == "silent":
            self.connection.recv(1)
            return
        whole, status = answer.body if answer.status < 300 else b"", answer.status
        headers = {"ETag": '"one"', "Last-Modified": DATE, "Content-Type": "application/zip"} | answer.headers
        place = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = not answer.if_range or self.headers["If-Range"] in (None, headers["ETag"], headers["Last-Modified"])
        if status == 200 and place and answer.ranges and same:
            status, start = 206, int(place[1])
            if start >= len(whole):
                status, whole = 416, b""
            else:
                headers = {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"} | headers
                whole = whole[start:]
        ends = {"length": {"Content-Length": str(len(whole))}, "chunked": {"Transfer-Encoding": "chunked"}, "close": {}}
        self.send_response(status)
        for name, value in ({"Connection": "close"} | ends[answer.ends] | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if body:
            with contextlib.suppress(ConnectionError):  # the client has had enough
                self.send(answer, whole)

    def send(self, answer: Answer, whole: bytes) -> None:
        step = 5000
        sent = whole if answer.stop is None else whole[: answer.stop]
        for start in range(0, len(sent), step):
            time.sleep(answer.pace)
            piece = sent[start : start + step]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if answer.ends == "chunked" else piece)
            self.asked["sent"] += len(piece)
        if answer.stop is None:
            if answer.ends == "chunked":
                self.wfile.write(b"0\r\n\r\n")
        elif answer.how == "stall":
            self.connection.recv(1)  # until the client leaves
        elif answer.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *args: object) -> None:
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Answers each address by its own list: the first request by the first, and all after the last by the last."""

    daemon_threads = True
    scheme = "http"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[dict] = []
        self.active = self.most = 0
        self.lock = threading.Lock()

    def publish(self, *answers: Answer, name: str = NAME) -> str:
        path = f"/{len(self.answers)}/{name}"
        self.answers[path] = list(answers)
        self.asked.clear()
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}{path}"

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
        try:
            yield
        finally:
            with self.lock:
                self.active -= 1

    @property
    def sent(self) -> int:
        return sum(asked["sent"] for asked in self.asked)

    @property
    def ranges(self) -> list[str | None]:
        return [asked["range"] for asked in self.asked]

    def handle_error(self, *args: object) -> None:
        """A client that leaves is no error."""


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


def get(url: str, folder: Path, *, name: str = NAME, checksum=None, size=None, patience=HASTE) -> Path:
    """Brings one file, and makes sure that only the right bytes have got the final name."""
    path = folder / name
    try:
        brought = bring([Remote(url, name, checksum, size)], folder, remedy="see the README", patience=patience)[name]
    finally:
        assert not path.exists() or path.read_bytes() in (FILE, b"")
        beginning = folder / f"{name}.part"
        assert not beginning.exists() or FILE.startswith(beginning.read_bytes())
    assert brought == (path, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert [entry.name for entry in folder.iterdir()] == [name]
    return path


NO_VALIDATOR = {"ETag": "", "Last-Modified": ""}
GOOD = Answer()
CUT = Answer(stop=60_000)
HTML = Answer(b"<html>Please log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
RANGE = "bytes=60000-"


@pytest.mark.parametrize(
    ("answers", "known", "ranges"),
    [
        pytest.param([GOOD], {}, [None], id="all is well"),
        pytest.param([Answer(ends="chunked")], {}, [None], id="no length"),
        pytest.param([GOOD], {"checksum": ("sha256", SHA256[1].upper()), "size": 200_000}, [None], id="all is known"),
        pytest.param([CUT, GOOD], {}, [None, RANGE], id="dropped once"),
        pytest.param([Answer(stop=20_000)], {}, [None, *(f"bytes={n}0000-" for n in range(2, 20, 2))],
                     id="dropped always, and never twice at the same byte"),
        pytest.param([Answer(stop=60_000, how="reset"), GOOD], {}, None, id="connection reset"),
        pytest.param([Answer(stop=0, how="silent"), GOOD], {}, [None, None], id="no answer"),
        pytest.param([Answer(stop=60_000, how="stall"), GOOD], {}, [None, RANGE], id="stalled"),
        pytest.param([Answer(stop=60_000, ends="chunked"), GOOD], {}, [None, RANGE], id="chunks that are cut short"),
        pytest.param([Answer(stop=60_000, ends="close"), GOOD], {"size": 200_000}, [None, RANGE],
                     id="cut short, and only the size tells"),
        pytest.param([Answer(stop=60_000, ends="close"), GOOD], {"checksum": SHA256}, [None, None],
                     id="cut short, and only the checksum tells"),
        pytest.param([Answer(pace=0.045)], {"patience": HASTE._replace(silence=1.5, retries=0)}, [None],
                     id="slow but steady"),
        pytest.param([CUT, Answer(ranges=False)], {}, [None, RANGE], id="ignores Range"),
        pytest.param([CUT, Answer(headers={"Content-Range": "bytes 60001-199999/200000"}), GOOD], {},
                     [None, RANGE, None], id="continues at another place"),
        pytest.param([CUT, Answer(headers={"Content-Range": ""}), GOOD], {}, [None, RANGE, None],
                     id="continues and does not say where"),
        pytest.param([Answer(status=206), GOOD], {}, [None, None], id="continues what was not begun"),
        pytest.param([Answer(OTHER, headers={"ETag": '"zero"'}, stop=60_000), GOOD], {}, [None, RANGE],
                     id="the file has changed"),
        pytest.param([Answer(OTHER, headers={"ETag": '"zero"'}, stop=60_000), Answer(if_range=False), GOOD], {},
                     [None, RANGE, None], id="the file has changed, and the server ignores If-Range"),
        pytest.param([Answer(OTHER, headers={"ETag": 'W/"zero"', "Last-Modified": DATE.replace("01", "02")},
                             stop=60_000), Answer(headers={"ETag": 'W/"one"'})], {}, [None, RANGE],
                     id="the file has changed, and has a weak ETag"),
        pytest.param([Answer(OTHER + b"more", headers=NO_VALIDATOR, stop=60_000), Answer(headers=NO_VALIDATOR), GOOD],
                     {"checksum": SHA256}, [None, RANGE, None], id="the file has become shorter, and has no ETag"),
        pytest.param([Answer(OTHER, headers=NO_VALIDATOR, stop=60_000), Answer(headers=NO_VALIDATOR)],
                     {"checksum": SHA256}, [None, RANGE, None], id="the file has changed, and only the checksum tells"),
        pytest.param([Answer(OTHER, headers=NO_VALIDATOR, stop=60_000), Answer(headers=NO_VALIDATOR)], {},
                     [None, None], id="the file has changed, and nothing would tell"),
        pytest.param([CUT, Answer(FILE[:50_000], if_range=False), GOOD], {}, [None, RANGE, None],
                     id="the file was short for a while"),
        pytest.param([Answer(status=500), Answer(status=503), Answer(status=408), GOOD], {}, [None] * 4, id="500s"),
        pytest.param([Answer(status=429, headers={"Retry-After": "1"}), GOOD], {}, [None] * 2, id="429"),
        pytest.param([Answer(status=503, headers={"Retry-After": DATE}), GOOD], {}, [None] * 2, id="503 with a date"),
        pytest.param([Answer(status=503, headers={"Retry-After": "soon"}), GOOD], {}, [None] * 2, id="503 with words"),
        pytest.param([Answer(headers={"Content-Encoding": "gzip"})], {"name": "images.gz"}, [None],
                     id="a .gz that is called an encoding"),
        pytest.param([Answer(b"")], {}, [None], id="an empty file"),
        pytest.param([Answer(headers={"Content-Type": "text/html"})], {"checksum": SHA256}, [None],
                     id="a good file that is called a web page"),
    ],
)  # fmt: skip
def test_it_comes_whole(server, tmp_path, capsys, answers, known, ranges):
    url = server.publish(*answers)
    get(url, tmp_path / "downloads", **known)
    assert ranges is None or server.ranges == ranges
    assert {asked["coding"] for asked in server.asked} == {"identity"}
    assert not [asked for asked in server.asked if asked["validator"].startswith("W/")]
    assert answers[0].status != 429 or "429 Too Many Requests; next attempt in 1 s" in capsys.readouterr().err


LATER = datetime.now(UTC) + timedelta(hours=20)
WRONG = f"SHA256 is {hashlib.sha256(OTHER).hexdigest()}, but {SHA256[1]} is published"


@pytest.mark.parametrize(
    ("answers", "known", "message", "requests"),
    [
        pytest.param([Answer(stop=60_000, ranges=False)], {}, "the connection broke off.*60.0kB, is kept", 4,
                     id="always dropped at the same byte"),
        pytest.param([Answer(stop=0, how="stall")], {"patience": HASTE._replace(retries=1)},
                     "nothing came for 0.5 s", 2, id="always stalled"),
        pytest.param([Answer(how="silent")], {"patience": HASTE._replace(retries=1)}, "no answer for 0.5 s", 2,
                     id="never an answer"),
        pytest.param([Answer(OTHER)], {"checksum": SHA256}, WRONG, 1, id="wrong bytes of the right length"),
        pytest.param([Answer(headers={"Content-Length": "250000"})], {}, "cannot be downloaded", 4,
                     id="fewer bytes than announced"),
        pytest.param([Answer(headers={"Content-Length": "150000"})], {"checksum": SHA256}, "SHA256 is", 1,
                     id="more bytes than announced"),
        pytest.param([Answer(headers={"Content-Length": "150000"})], {"size": 200_000},
                     "the server sends 150000 bytes, application/zip; expected are 200000", 1,
                     id="a length that is not the published one"),
        pytest.param([Answer(FILE + b"more", ends="chunked")], {"size": 200_000}, "more than the expected 200000 bytes",
                     1, id="chunks without end"),
        pytest.param([Answer(stop=60_000, ends="chunked", ranges=False)], {}, "the connection broke off", 4,
                     id="chunks that are always cut short"),
        pytest.param([Answer(ends="close")], {}, "does not tell its length", 1, id="no way to tell where it ends"),
        pytest.param([Answer(status=404)], {}, r"\(404 Not Found\); see the README$", 1, id="404"),
        pytest.param([Answer(status=403)], {}, r"\(403 Forbidden\)", 1, id="403"),
        pytest.param([Answer(status=401)], {}, r"\(401 Unauthorized\)", 1, id="401"),
        pytest.param([Answer(status=204, ends="close")], {}, r"\(204 No Content\)", 1, id="204"),
        pytest.param([Answer(status=500)], {}, r"\(500 Internal Server Error\)", 4, id="500 for ever"),
        pytest.param([Answer(status=429, headers={"Retry-After": "3600"})], {}, "asks to come back in 3600 s", 1,
                     id="429 for an hour"),
        pytest.param([Answer(status=503, headers={"Retry-After": format_datetime(LATER, usegmt=True)})], {},
                     r"asks to come back in \d{5} s", 1, id="503 until tomorrow"),
        pytest.param([HTML], {}, "sends a web page instead", 1, id="a web page"),
        pytest.param([HTML], {"size": 200_000}, "sends 26 bytes, text/html; charset=utf-8; expected are 200000", 1,
                     id="a web page for a known size"),
        pytest.param([HTML], {"checksum": SHA256}, r"\(the server calls it a web page\), but \w{64} is published", 1,
                     id="a web page for a known checksum"),
        pytest.param([Answer(headers={"Content-Encoding": "gzip"})], {}, "the server compresses it, gzip", 1,
                     id="compressed against our will"),
    ],
)  # fmt: skip
def test_it_is_refused(server, tmp_path, answers, known, message, requests):
    url = server.publish(*answers)
    with pytest.raises(UserError, match=message) as error:
        get(url, tmp_path / "downloads", **known)
    assert str(error.value).startswith(url)
    assert "see the README" in str(error.value)
    assert not (tmp_path / "downloads" / NAME).exists()
    assert len(server.asked) == requests


def test_what_has_arrived_is_taken_up_by_the_next_run(server, tmp_path):
    url = server.publish(Answer(stop=60_000), Answer(status=403), Answer(stop=70_000), Answer(status=403), GOOD)
    for kept in ("60.0kB", "130kB"):
        with pytest.raises(UserError, match=f"403 Forbidden.*what has arrived, {kept}, is kept"):
            get(url, tmp_path / "downloads")
    get(url, tmp_path / "downloads")
    assert server.sent == len(FILE)


def test_what_has_arrived_from_another_address_is_not_taken_up(server, tmp_path):
    first, second = server.publish(Answer(stop=60_000), Answer(status=403)), server.publish(GOOD)
    with pytest.raises(UserError, match="403"):
        get(first, tmp_path / "downloads")
    get(second, tmp_path / "downloads")
    assert server.ranges[-1] is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"url": "x"}'])
def test_a_part_that_nothing_is_known_of_is_not_taken_up(server, tmp_path, text):
    (tmp_path / f"{NAME}.part").write_bytes(FILE[:1000])
    if text is not None:
        (tmp_path / f"{NAME}.part.json").write_text(text)
    get(server.publish(GOOD), tmp_path)
    assert server.ranges == [None]


def test_a_card_without_its_part_says_nothing(server, tmp_path):
    url = server.publish(CUT, Answer(status=403), GOOD)
    with pytest.raises(UserError, match="403"):
        get(url, tmp_path)
    (tmp_path / f"{NAME}.part").unlink()
    get(url, tmp_path)
    assert server.ranges == [None, RANGE, None]


def test_a_part_that_lacks_only_its_name_is_not_fetched(server, tmp_path):
    url = server.publish(CUT, Answer(status=403))
    with pytest.raises(UserError, match="403"):
        get(url, tmp_path)
    (tmp_path / f"{NAME}.part").write_bytes(FILE)
    server.asked.clear()
    get(url, tmp_path)
    assert server.asked == []


def test_a_part_that_was_damaged_on_the_disk_is_found_out(server, tmp_path):
    url = server.publish(CUT, Answer(status=403), GOOD)
    with pytest.raises(UserError, match="403"):
        get(url, tmp_path, checksum=SHA256)
    (tmp_path / f"{NAME}.part").write_bytes(bytes(60_000))
    get(url, tmp_path, checksum=SHA256)
    assert server.ranges == [None, RANGE, RANGE, None]


def test_a_redirect_is_followed_also_for_the_rest(server, tmp_path):
    target = server.publish(CUT, GOOD)
    url = server.publish(Answer(status=302, headers={"Location": target}))
    get(url, tmp_path)
    assert [(asked["path"] in target, asked["range"]) for asked in server.asked] == [
        (False, None), (True, None), (False, RANGE), (True, RANGE),
    ]  # fmt: skip


def test_a_redirect_to_itself_is_told(server, tmp_path):
    url = server.publish(GOOD)
    server.answers[urlsplit(url).path] = [Answer(status=302, headers={"Location": url})]
    with pytest.raises(UserError, match="it is redirected without end"):
        get(url, tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:{port}/a.zip", r"cannot be downloaded \(no connection\); see the README$"),
        ("http://nowhere.invalid/a.zip", r"cannot be downloaded \(no connection\)"),
        ("gopher://127.0.0.1/a.zip", "No connection adapters"),
        ("127.0.0.1/a.zip", "No scheme supplied"),
    ],
)
def test_an_address_where_nobody_is_is_told_soon(tmp_path, capsys, url, message):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=message):
        get(url.format(port=port), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("next attempt") < HASTE.retries


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run([*command, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server() as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        running.scheme = "https"
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(UserError, match="the certificate of the server cannot be verified"):
            get(running.publish(GOOD), tmp_path / "downloads")
        running.shutdown()


def test_a_file_that_is_here_is_fetched_only_if_it_is_not_the_published_one(server, tmp_path, capsys):
    url = server.publish(GOOD)
    for known in ({}, {"checksum": SHA256}, {"size": len(FILE)}):
        get(url, tmp_path, **known)
    assert len(server.asked) == 1
    for known in ({"checksum": SHA256}, {"size": len(FILE)}):
        (tmp_path / NAME).write_bytes(FILE[:-1])
        get(url, tmp_path, **known)
    assert len(server.asked) == 3
    assert f"{tmp_path / NAME}: is damaged or not the published file; fetching it again" in capsys.readouterr().err


def remotes(server, *names: str, answers=(GOOD,), **known) -> list[Remote]:
    return [Remote(server.publish(*answers, name=name), name, **known) for name in names]


def test_several_come_side_by_side_but_not_too_many(server, tmp_path):
    files = remotes(server, *(f"{n}.zip" for n in range(6)), answers=[Answer(pace=0.003)])
    server.most = 0
    brought = bring(files, tmp_path, remedy="", parallel=2, patience=HASTE)
    assert list(brought) == [file.name for file in files]
    assert all(file.path.read_bytes() == FILE for file in brought.values())
    assert server.most == 2


@pytest.mark.parametrize("ends", ["length", "chunked", "close"])
def test_the_first_that_fails_stops_the_others_and_their_parts_are_kept(server, tmp_path, ends):
    names = ("a.zip", "b.zip", "c.zip")
    files = remotes(server, *names, answers=[Answer(stop=60_000, how="stall", ends=ends), GOOD], checksum=SHA256)
    bad = remotes(server, "d.zip", answers=[Answer(pace=0.01, headers={"Content-Length": "150000"})], checksum=SHA256)
    with pytest.raises(UserError, match="SHA256 is"):
        bring([*files, *bad], tmp_path, remedy="", patience=HASTE._replace(silence=60))
    assert sorted(path.name for path in tmp_path.glob("*.part")) == [f"{name}.part" for name in names]
    server.asked.clear()
    bring(files, tmp_path, remedy="", patience=HASTE)
    assert server.ranges == [RANGE] * 3


def test_each_file_needs_a_name(tmp_path):
    for names in (("a", "a"), ("../a",), ("",), ("a/b",)):
        with pytest.raises(ValueError, match="each file needs a name of its own"):
            bring([Remote("http://127.0.0.1", name) for name in names], tmp_path, remedy="")


def test_only_one_process_downloads_into_a_folder(server, tmp_path):
    url = server.publish(GOOD)
    with FileLock(tmp_path / ".downloads.lock"), pytest.raises(UserError, match="another process is downloading"):
        get(url, tmp_path / "downloads")
    get(url, tmp_path / "downloads")


@pytest.mark.parametrize(
    ("number", "head", "known", "gets"),
    [
        (1, 200, {}, 1),  # its answer tells the length
        (1, 200, {"size": 200_000}, 0),
        (2, 200, {}, 0),
        (2, 405, {}, 2),  # a server that does not tell beforehand
    ],
)
def test_a_disk_that_is_too_small_is_told_before_it_is_full(server, tmp_path, monkeypatch, number, head, known, gets):
    free = 150_000 if number == 1 else 390_000
    if head != 200:
        free = 150_000
        monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.send_error(head))
    files = remotes(server, *(f"{n}.zip" for n in range(number)), **known)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - free, free))
    with pytest.raises(UserError) as error:
        bring(files, tmp_path, remedy="", parallel=1, patience=HASTE)
    needed = "200kB" if head != 200 or number == 1 else "400kB"
    assert str(error.value).startswith(f"{tmp_path}: too little room for the download: it needs {needed} more, and")
    assert f"{free // 1000}kB are free" in str(error.value)
    assert len(server.asked) == min(gets, 1)
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_missing_needs_room(server, tmp_path, monkeypatch):
    url = server.publish(CUT, Answer(status=403), GOOD)
    with pytest.raises(UserError, match="403"):
        get(url, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 140_000, 140_000))
    get(url, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gets_full_keeps_what_has_arrived(server, tmp_path, monkeypatch, code):
    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            room = 50_000 - self.tell()
            if room < len(data):
                super().write(data[:room])
                raise OSError(code, os.strerror(code), self.name)
            return super().write(data)

    url, opened = server.publish(GOOD), Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda path, *how, **more: (FullDisk if how == ("ab",) else opened)(path, *how, **more)
        )
        with pytest.raises(UserError, match=rf"{NAME}\.part: the disk is full; free some space, then run again: what"):
            get(url, tmp_path)
    server.asked.clear()
    get(url, tmp_path)
    assert server.ranges == ["bytes=50000-"]


def test_a_folder_that_may_not_be_written_is_no_network_error(server, tmp_path):
    (tmp_path / f"{NAME}.part").mkdir()
    with pytest.raises(OSError, match=f"{NAME}.part"):
        bring([Remote(server.publish(GOOD), NAME)], tmp_path, remedy="", patience=HASTE)


def test_the_bar_tells_how_far_it_is(server, tmp_path, monkeypatch):
    shown = io.StringIO()

    def bar(**arguments) -> tqdm:
        return tqdm(**arguments | {"disable": False, "ascii": True, "file": shown, "mininterval": 0})

    monkeypatch.setattr(download, "tqdm", bar)
    answers = [Answer(stop=60_000), Answer(ranges=False)]  # goes back, too
    bring(remotes(server, "a.zip", "b.zip", answers=answers), tmp_path, remedy="", patience=HASTE)
    last = shown.getvalue().split("\r")[-1]
    assert re.match(r"2 files: 100%\|#+\| 400k/400k \[\d\d:\d\d<\d\d:\d\d, [\d.]+[kM]?B/s\]", last)


PROGRAM = """
import signal, sys
from pathlib import Path
from fadeformer.datasets.download import Patience, Remote, bring
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
urls, folder = sys.argv[2:], Path(sys.argv[1])
try:
    bring([Remote(url, f"{n}.zip") for n, url in enumerate(urls)], folder, remedy="", patience=Patience(silence=300))
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


def begun(server: Server, folder: Path, *urls: str, parts: int) -> subprocess.Popen:
    """Starts a process that downloads, and waits until it has got all that it will get of so many parts."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, folder, *urls], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while server.active < len(urls) or [path.stat().st_size for path in folder.glob("*.part")] != [STALL.stop] * parts:
        assert time.monotonic() < until, "the download did not begin"
        time.sleep(0.02)
    return process


STALL = Answer(stop=61_000, how="stall", pace=0.01)  # the last 1000 alone, which no buffer must keep


def test_after_a_kill_only_the_rest_is_fetched(server, tmp_path):
    url = server.publish(STALL, GOOD)
    process = begun(server, tmp_path, url, parts=1)
    process.kill()
    process.communicate()
    assert [path.name for path in tmp_path.glob("*.zip")] == []
    server.asked.clear()
    get(url, tmp_path, name="0.zip")
    assert server.ranges == ["bytes=61000-"]
    assert server.sent == len(FILE) - 61_000


def test_ctrl_c_ends_it_at_once_and_keeps_what_has_arrived(server, tmp_path):
    urls = [server.publish(STALL), server.publish(STALL), server.publish(Answer(how="silent"))]
    process = begun(server, tmp_path, *urls, parts=2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)  # five times less than the patience with a silent server
    assert told == "interrupted\n"
    assert sorted(path.name for path in tmp_path.glob("*.zip*")) == [
        f"{n}.zip.part{card}" for n in (0, 1) for card in ("", ".json")
    ]


def test_no_thread_goes_on_after_an_error(server, tmp_path):
    before = set(threading.enumerate())
    files = remotes(server, "a.zip", "b.zip", answers=[Answer(stop=10_000, how="stall")])
    bad = remotes(server, "c.zip", answers=[Answer(pace=0.01, headers={"Content-Length": "150000"})], checksum=SHA256)
    with pytest.raises(UserError, match="SHA256 is"):
        bring([*files, *bad], tmp_path, remedy="", patience=HASTE._replace(silence=60))
    # Those of the server wait for the client to leave, and so end a little later.
    assert [thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name] == []


drops = st.tuples(st.integers(0, len(FILE)), st.sampled_from(["close", "reset"]), st.booleans(), st.booleans())


@settings(max_examples=40)
@given(drops=st.lists(drops, max_size=6), ends=st.sampled_from(["length", "chunked"]), checksum=st.booleans())
def test_wherever_it_breaks_off_the_right_bytes_come(server, tmp_path_factory, drops, ends, checksum):
    answers = [
        Answer(
            FILE if same else OTHER, headers={"ETag": '"one"' if same else '"zero"'}, stop=stop, how=how,
            ranges=ranges, ends=ends,
        )
        for stop, how, ranges, same in drops
    ]  # fmt: skip
    patience = HASTE._replace(retries=10, first_wait=0, silence=5)
    url = server.publish(*answers, Answer(ends=ends))
    brought = bring(
        [Remote(url, NAME, SHA256 if checksum else None)],
        tmp_path_factory.mktemp("drops"),
        remedy="",
        patience=patience,
    )
    assert brought[NAME].path.read_bytes() == FILE
