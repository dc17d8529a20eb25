"""Requests to an OpenAI-compatible server, with the standard library only.

Failures that may pass (no connection, timeouts, 408, 429, 5xx, a reply that does not count) are
tried again after `backoff`, twice, four times … that many seconds, or what Retry-After asks for;
others are final.
"""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from alphaspin.errors import InputError, ServerError

S = TypeVar("S")
T = TypeVar("T")


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

        Raises:
            InputError: no such kind of address.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(
                f"{setting} {url!r}: needs an address that begins with http:// or https://"
            )
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._workers, self._attempts = workers, attempts
        self._backoff, self._timeout = backoff, timeout

    def each(
        self, items: Sequence[S], ask: Callable[[S, threading.Event], T | None]
    ) -> Iterator[tuple[int, T]]:
        """Numbers and results of `ask` as they come; after a failure, of what is under way still.

        `ask` gets an event that ends its waiting (see `post`).
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

    def post(
        self,
        address: str,
        body: dict[str, Any],
        read: Callable[[bytes], T],
        *,
        wanted: str,
        stop: threading.Event | None = None,
    ) -> T | None:
        """What `read` makes of the reply, or None where `stop` ended the waiting.

        Args:
            address: of the request, in full.
            body: sent as JSON.
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
                request = urllib.request.Request(address, json.dumps(body).encode(), self._headers)
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return read(response.read())
            except urllib.error.HTTPError as error:
                told = error.read(300).decode(errors="replace")
                trouble = f"HTTP {error.code}: {told}"
                if error.code not in (408, 429) and error.code < 500:
                    raise ServerError(f"{address}: {trouble}", error.code) from None
                wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                trouble, wait = str(error) or type(error).__name__, 0.0
        raise ServerError(f"{address}: no {wanted} in {self._attempts} attempts; last: {trouble}")


def parsed(reply: bytes, kind: str, pick: Callable[[Any], T]) -> T:
    """What `pick` finds in a JSON reply.

    Raises:
        ValueError: it is not of this kind, or `pick` raises it.
    """
    try:
        return pick(json.loads(reply))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError):
        raise ValueError(f"not a {kind}: {reply[:200]!r}") from None


def key_of(variable: str | None, setting: str) -> str | None:
    """The API key in an environment variable.

    Raises:
        InputError: it is not set.
    """
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        raise InputError(f"{setting} = {variable}: is not set")
    return key


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds, at most a minute; 0 where it is a date or absent."""
    return min(60.0, float(text)) if text and text.isdecimal() else 0.0
