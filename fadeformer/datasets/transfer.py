"""One remote file on its way: over as many attempts as it takes, and checked before it gets its name."""

from __future__ import annotations

import contextlib
import random
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError, InvalidHeader, ProtocolError, ReadTimeoutError
from urllib3.util import Retry

from fadeformer.datasets.part import AT_ONCE, Origin, Part, digests
from fadeformer.errors import PassingError, UserError
from fadeformer.files import FULL, told

AS_IT_IS = {"Accept-Encoding": "identity"}  # a range counts bytes as they are sent, so they must not be compressed
PASSING = (408, 425, 429)  # with every 5xx: the server may answer otherwise in a while
NOT_THERE = (404, 410)
FIRST_CONTACT = 2  # retries while no server has answered at all: the address is wrong, or there is no network


class Remote(NamedTuple):
    """A file to bring: its address, its name here, and what is published of it: ("md5", "a8b0..."), bytes."""

    url: str
    name: str
    checksum: tuple[str, str] | None = None
    size: int | None = None


class Brought(NamedTuple):
    """A file that is here, whole."""

    path: Path
    sha256: str
    size: int


class Patience(NamedTuple):
    """How long to go on when a server fails; seconds, but for `retries`."""

    retries: int = 8  # attempts in a row that bring nothing new
    first_wait: float = 1.0  # doubles with each of them
    longest_wait: float = 60.0
    longest_asked: float = 600.0  # a server that asks for a longer pause (Retry-After) is left to the user
    silence: float = 30.0  # without a byte for so long, a connection counts as lost


class NotThere(UserError):  # noqa: N818  a kind of the user's error
    """The server is there, and has no such file."""


class Dropped(Exception):  # noqa: N818  no error yet: the next attempt may go well
    """An attempt brought nothing, or a part; `pause` is how long the server asks to be left alone, seconds."""

    def __init__(self, reason: str, pause: float = 0) -> None:
        super().__init__(reason)
        self.pause = pause


class Stopped(Exception):  # noqa: N818  no error: another file failed, or the user pressed Ctrl-C
    """The transfer was told to stop."""


class Transfer:
    """One file on its way into a folder.

    Args:
        file: which.
        folder: where to.
        remedy: what the user can do if it cannot be had.
        patience: how long to go on.
    """

    def __init__(self, file: Remote, folder: Path, remedy: str, patience: Patience) -> None:
        self.file = file
        self.remedy = remedy
        self.patience = patience
        self.path = folder / file.name
        self.part = Part(self.path, {"sha256", file.checksum[0] if file.checksum else "sha256"})
        self.length = file.size  # None until it is known
        self.moved: Callable[[], object] = lambda: None  # called when bytes have arrived
        self._stop = threading.Event()
        self._answer: requests.Response | None = None  # the last one
        self._doubtful = False  # the bytes may be of two versions of the file, or too few

    def stop(self) -> None:
        """Makes the thread that runs this transfer end soon; what has arrived is kept."""
        self._stop.set()
        if self._answer is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # its connection has ended already
                self._answer.raw.shutdown()

    def find(self) -> Brought | None:
        """The file, if it is here already; if not, what an earlier run left of it is taken up."""
        if self.path.is_file():
            size = self.path.stat().st_size
            found = digests(self.path, self.part.algorithms)
            if self.file.size in (None, size) and self._mismatch(found) is None:
                return Brought(self.path, found["sha256"].hexdigest(), size)
            _say(f"{self.path}: is damaged or not the published file; fetching it again")
        self.part.take_up(Origin(self.file.url, None, None, self.length))
        if self.part.origin is not None:
            self._doubtful = True
            self.length = self.length or self.part.origin.length
        return None

    def ask_length(self) -> None:
        """Learns the length beforehand where the server tells it; where not, `fetch` learns it, or what is wrong."""
        if self.length is None:
            silence = self.patience.silence
            with contextlib.suppress(requests.RequestException), requests.Session() as session:
                answer = session.head(self.file.url, headers=AS_IT_IS, allow_redirects=True, timeout=silence)
                self.length = _number(answer.headers.get("Content-Length")) if answer.status_code == 200 else None

    def fetch(self) -> Brought:
        """Brings the file.

        Raises:
            UserError: it cannot be had, or is not the right one, or the disk is full.
            Stopped: `stop` was called.
        """
        try:
            wrong = self._collect()
            if wrong is not None and self._doubtful:
                _say(f"{self.file.name}: {wrong}; begun anew, because it came in pieces")
                wrong = self._collect()
            if wrong is not None:
                raise UserError(f"{self.file.url}: {wrong}; the file is damaged or another one; {self.remedy}")
            self.part.rename(self.path)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"{self.part.path}: the disk is full; free some space, then run again: what has arrived is kept"
            ) from error
        return Brought(self.path, self.part.digests["sha256"].hexdigest(), self.part.size)

    def _collect(self) -> str | None:
        """Completes the part; returns what is wrong with it, which is then gone."""
        fruitless = farthest = 0
        with requests.Session() as session:
            while True:
                try:
                    self._attempt(session)
                    break
                except Dropped as drop:
                    if self.part.size > farthest:
                        fruitless, farthest = 0, self.part.size
                    self._wait(drop, fruitless)
                    fruitless += 1
        wrong = self._mismatch(self.part.digests)
        if wrong is not None:
            self.part.discard()
        return wrong

    def _wait(self, drop: Dropped, fruitless: int) -> None:
        retries, first, longest, longest_asked, _ = self.patience
        self._go_on()
        if fruitless >= (min(retries, FIRST_CONTACT) if self._answer is None else retries):
            raise self._error(str(drop), PassingError) from drop
        if drop.pause > longest_asked:
            raise self._error(f"{drop}; the server asks to come back in {drop.pause:.0f} s", PassingError) from drop
        # The random share keeps clients that were dropped together from coming back together.
        pause = max(drop.pause, min(longest, first * 2**fruitless) * random.uniform(0.5, 1))  # noqa: S311
        _say(f"{self.file.name}: {drop}; next attempt in {pause:.0f} s")
        self._stop.wait(pause)
        self._go_on()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _attempt(self, session: requests.Session) -> None:
        """Asks for what is missing, and takes what comes."""
        headers, origin = dict(AS_IT_IS), self.part.origin
        if origin is not None and origin.length == self.part.size:
            return  # the last run ended between the last byte and the name
        if origin is not None and origin.validator is not None:
            headers |= {"Range": f"bytes={self.part.size}-", "If-Range": origin.validator}
        elif origin is not None and self.file.checksum is not None:  # which will tell if the file was another one
            headers |= {"Range": f"bytes={self.part.size}-"}
        try:
            answer = session.get(self.file.url, headers=headers, stream=True, timeout=self.patience.silence)
        except requests.RequestException as error:
            raise self._failure(error) from error
        with contextlib.closing(answer):
            self._answer = answer
            self._go_on()
            self._check(answer)
            if answer.status_code == 206:
                self._continue(answer)
            else:
                self._begin(answer)
            self._receive(answer)

    def _check(self, answer: requests.Response) -> None:
        """Tells an answer with the file, or the rest of it, from all others."""
        status = f"{answer.status_code} {answer.reason}"
        if answer.status_code == 416:
            self.part.discard()
            raise Dropped("the file has become shorter; begun anew")
        if answer.status_code >= 500 or answer.status_code in PASSING:
            raise Dropped(status, _retry_after(answer))
        if answer.status_code in NOT_THERE:
            raise NotThere(str(self._error(status)))
        if answer.status_code not in (200, 206):
            raise self._error(status)
        coding = answer.headers.get("Content-Encoding", "identity")
        # Some servers give a .gz file as an encoding of what is in it: then the bytes are right as they are.
        if coding != "identity" and self.path.suffix not in (".gz", ".tgz"):
            raise self._error(f"the server compresses it, {coding}, although asked not to")

    def _begin(self, answer: requests.Response) -> None:
        """Starts anew, from an answer with the whole file."""
        kind = answer.headers.get("Content-Type", "of no type")
        origin = self._origin(answer, answer.headers.get("Content-Length"))
        self._doubtful = origin.length is None and "chunked" not in answer.headers.get("Transfer-Encoding", "")
        if self.file.size is not None and origin.length not in (None, self.file.size):
            raise self._error(f"the server sends {origin.length} bytes, {kind}; expected are {self.file.size}")
        if self.file.size is None and self.file.checksum is None:
            if kind.startswith("text/html") and self.path.suffix not in (".html", ".htm"):
                raise self._error("the server sends a web page instead")
            if self._doubtful:
                raise self._error("the server does not tell its length, so it could be cut short unnoticed")
        self.length = self.file.size if origin.length is None else origin.length
        self.part.begin(origin._replace(length=self.length))

    def _continue(self, answer: requests.Response) -> None:
        """Makes sure that an answer goes on where the part ends, and in the same file."""
        self._doubtful = True
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        now, before = self._origin(answer, place[2] if place else None), self.part.origin
        self.length = now.length or self.length
        if not (before and before.fits(now) and place and int(place[1]) == self.part.size and self.length):
            self.part.discard()
            raise Dropped("the server goes on with another file or at another place; begun anew")

    def _origin(self, answer: requests.Response, length: str | None) -> Origin:
        headers = answer.headers
        return Origin(self.file.url, headers.get("ETag"), headers.get("Last-Modified"), _number(length))

    def _receive(self, answer: requests.Response) -> None:
        end = self.length
        with self.part.path.open("ab") as file:
            while (end is None or self.part.size <= end) and (chunk := self._read(answer)):
                self.part.append(file, chunk)
                self.moved()
        if end is not None and self.part.size > end:
            self.part.discard()
            raise self._error(f"the server sends more than the expected {end} bytes")
        if end is not None and self.part.size < end:
            raise Dropped("the connection broke off")

    def _read(self, answer: requests.Response) -> bytes:
        try:  # read1 gives what has come; read would wait for all that it was asked for, and lose it in a drop
            chunk: bytes = answer.raw.read1(AT_ONCE, decode_content=False)
        except ReadTimeoutError as error:
            raise Dropped(f"nothing came for {self.patience.silence:g} s") from error
        except HTTPError as error:
            raise Dropped("the connection broke off") from error
        self._go_on()  # after `stop` the answer only seems to be at its end
        return chunk

    def _mismatch(self, found: dict[str, Any]) -> str | None:
        """What speaks against digests, if anything."""
        if self.file.checksum is None:
            return None
        algorithm, published = self.file.checksum
        digest = found[algorithm].hexdigest()
        if digest == published.lower():
            return None
        page = self._answer is not None and "text/html" in self._answer.headers.get("Content-Type", "")
        hint = " (the server calls it a web page)" if page else ""
        return f"{algorithm.upper()} is {digest}{hint}, but {published} is published"

    def _failure(self, error: requests.RequestException) -> Exception:
        """What to make of a request without an answer."""
        cause = error.args[0] if error.args else None
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return self._error("the certificate of the server cannot be verified")
        if isinstance(error, requests.TooManyRedirects):
            return self._error("it is redirected without end")
        if isinstance(error, requests.ReadTimeout):
            return Dropped(f"no answer for {self.patience.silence:g} s")
        if isinstance(error, requests.exceptions.ChunkedEncodingError) or isinstance(cause, ProtocolError):
            return Dropped("the connection broke off")
        return Dropped("no connection") if isinstance(error, requests.ConnectionError) else self._error(str(error))

    def _error(self, what: str, kind: type[UserError] = UserError) -> UserError:
        kept = f"; what has arrived, {told(self.part.size)}, is kept" if self.part.size else ""
        return kind(f"{self.file.url}: cannot be downloaded ({what}); {self.remedy}{kept}")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # leaves the bar whole


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _retry_after(answer: requests.Response) -> float:
    try:
        return Retry().parse_retry_after(answer.headers.get("Retry-After", "0"))
    except InvalidHeader:  # says nothing
        return 0.0
