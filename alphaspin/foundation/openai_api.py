"""Requests to an OpenAI-compatible server, with the standard library only.

Failures that may pass (no connection, timeouts, 408, 429, 5xx, a reply that does not count) are
tried again after `backoff`, twice, four times … that many seconds, or what Retry-After asks for;
others are final. A server may be anybody's: replies are bounded in size and time, nobody is sent
on to another address with the key, and what is told of a reply is one plain line.
"""

import http.client
import io
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Any, TypeVar

from alphaspin.errors import InputError, ServerError
from alphaspin.foundation.section import short, unless_recorded

S = TypeVar("S")
T = TypeVar("T")


LARGEST = 2**25
"""Bytes of a reply."""


def checked_address(url: str) -> str:
    """An address without a key in it, which would be written down wherever settings are.

    Raises:
        InputError: it is none, or has more.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        raise InputError("needs an address like http://HOST:8000/v1") from None
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(
            "needs an address that begins with http:// or https://, as http://HOST:8000/v1"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(
            "needs an address up to and with /v1 alone; a key belongs into the environment "
            "variable that key_variable names"
        )
    return url.rstrip("/")


def _variable(name: str) -> str:
    """The name of an environment variable.

    Raises:
        InputError: it is none; does not repeat what may be the key itself.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InputError("needs the name of an environment variable, not the key that is in it")
    return name


Address = Annotated[str, unless_recorded(checked_address)]


Variable = Annotated[str, unless_recorded(_variable)]


class _Timed(io.RawIOBase):
    """A socket's bytes until a deadline, however slowly they come."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket):
        super().__init__()
        self._raw, self._connection = raw, connection
        self._deadline = time.monotonic() + (connection.gettimeout() or 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)
        return self._raw.readinto(buffer)  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    """A reply that has to be whole within the timeout of its connection."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock))


class _Http(http.client.HTTPConnection):
    response_class = _Reply

    def __init__(self, host: str, *, path: str | None = None, **options: Any):
        super().__init__(host, **options)
        self._path = path

    def connect(self) -> None:
        if self._path is None:
            return super().connect()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Https(http.client.HTTPSConnection):
    response_class = _Reply


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, path: str | None):
        super().__init__()
        self._path = path

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, req, path=self._path)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, req)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody: a redirected POST arrives as a GET, and with the key."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        return None


class Client:
    """One server."""

    def __init__(
        self,
        url: str,
        *,
        setting: str,
        key: str | None = None,
        workers: int = 8,
        attempts: int = 5,
        backoff: float = 1.0,
        timeout: float = 120.0,
        socket_path: str | None = None,
    ):
        """Nothing is sent yet.

        Args:
            url: up to and with `/v1`.
            setting: what the address belongs to, for the error message.
            key: sent as a bearer token.
            workers: requests under way at once.
            attempts: tries per request.
            backoff: first pause between tries, in seconds.
            timeout: of one try, in seconds.
            socket_path: of a server on this machine, whatever the host of the address.

        Raises:
            InputError: no such kind of address.
        """
        try:
            self.url = checked_address(url)
        except InputError as error:
            raise InputError(f"{setting} {short(url)}: {error}") from None
        ways: list[Any] = [_Plain(socket_path), _Secure, _Stay]
        if socket_path:
            ways.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*ways)
        self._key = key
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._workers, self._attempts = workers, attempts
        self._backoff, self._timeout = backoff, timeout

    def each(
        self, items: Sequence[S], ask: Callable[[S, threading.Event], T | None]
    ) -> Iterator[tuple[int, T]]:
        """Numbers and results of `ask` as they come; after a failure, of what is under way still.

        `ask` gets an event that ends its waiting (see `send`).
        """
        stop = threading.Event()

        def one(item: S) -> T | None:
            try:
                return None if stop.is_set() else ask(item, stop)
            except BaseException:
                stop.set()
                raise

        failure: BaseException | None = None
        with ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(one, item): i for i, item in enumerate(items)}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None:
                        failure = failure or error
                    elif (result := future.result()) is not None:
                        yield futures[future], result
            finally:
                stop.set()  # whoever stops listening need not wait for the rest
        if failure:
            raise failure

    def send(
        self,
        address: str,
        body: dict[str, Any] | None,
        read: Callable[[bytes], T],
        *,
        wanted: str,
        stop: threading.Event | None = None,
    ) -> T | None:
        """What `read` makes of the reply, or None where `stop` ended the waiting.

        Args:
            address: of the request, in full.
            body: sent as JSON; None for a GET.
            read: raises ValueError for a reply that does not count.
            wanted: what one asks for, in a word.
            stop: ends pauses between tries.

        Raises:
            ServerError: it failed for good.
        """
        trouble, wait = "", 0.0
        stop = stop or threading.Event()
        for attempt in range(self._attempts):
            if attempt and stop.wait(max(wait, self._backoff * 2 ** (attempt - 1))):
                return None
            try:
                content = None if body is None else json.dumps(body).encode()
                request = urllib.request.Request(address, content, self._headers)
                with self._opener.open(request, timeout=self._timeout) as response:
                    return read(_whole(response))
            except urllib.error.HTTPError as error:
                trouble = self._line(f"HTTP {error.code}: {_told(error)}")
                if error.code not in (408, 429) and (error.code < 500 or error.code == 501):
                    raise ServerError(f"{address}: {trouble}", error.code) from None
                wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                trouble, wait = self._line(str(error) or type(error).__name__), 0.0
        raise ServerError(f"{address}: no {wanted} in {self._attempts} attempts; last: {trouble}")

    def _line(self, text: str) -> str:
        """What is told of a reply: a line without the key, and without signs that steer."""
        text = text.replace(self._key, "…") if self._key else text
        plain = "".join(sign if sign.isprintable() else " " for sign in text)
        return " ".join(plain.split())


def _whole(response: Any) -> bytes:
    """A reply's bytes.

    Raises:
        ValueError: it is too large.
        HTTPException: it was cut short.
    """
    found = response.read(LARGEST + 1)
    if len(found) > LARGEST:
        raise ValueError(f"a reply of more than {LARGEST >> 20} MiB")
    if response.length:
        raise http.client.IncompleteRead(found, response.length)
    return found


def _told(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, or where it would send one."""
    try:
        with error:
            if 300 <= error.code < 400:
                there = short(error.headers.get("Location"))
                return f"redirects to {there}; give the final address"
            return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException) as cut:
        return f"({type(cut).__name__})"


def parsed(reply: bytes, kind: str, pick: Callable[[Any], T]) -> T:
    """What `pick` finds in a JSON reply.

    Raises:
        ValueError: it is not of this kind.
    """
    try:
        return pick(json.loads(reply, parse_constant=int))  # NaN is no int: ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"not a {kind}: {reply[:200]!r}") from None


def key_of(variable: str | None, setting: str) -> str | None:
    """The API key in an environment variable.

    Raises:
        InputError: it is not set, or is no key.
    """
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        # A name with small letters may be the key itself.
        shown = variable if variable.isupper() else f"{variable[:4]}…"
        raise InputError(f"{setting} = {shown}: is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"{setting} = {variable}: has signs that no key has")
    return key


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds, at most a minute; 0 where it is a date or absent."""
    return min(60.0, float(text)) if text and text.isdecimal() else 0.0
