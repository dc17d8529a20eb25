"""A server may be anybody's: what it does ends in a retry or in one line, and no key leaves."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import http_servers
from pydantic import ValidationError

from alphaspin.config import Config
from alphaspin.errors import InputError, ServerError
from alphaspin.foundation import openai_api
from alphaspin.foundation.openai_api import Client, checked_address, key_of, parsed
from alphaspin.foundation.section import RECORDED

KEY = "sk-s3cret"
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def read_request(connection: socket.socket) -> None:
    """All of it: what is left unread makes closing a reset, which overtakes the reply."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"(?i)content-length: *(\d+)", head)
    while len(body) < int(length):
        body += connection.recv(65536)


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Start a server that answers each connection, once asked, as `reply` does."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(reply: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        read_request(connection)
                        reply(connection)
                    except OSError:
                        pass

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


def ask(url: str, timeout: float = 5.0) -> Any:
    client = Client(url, setting="judge", key=KEY, attempts=2, backoff=0.001, timeout=timeout)
    return client.send(
        f"{client.url}/x", {}, lambda reply: parsed(reply, "reply", lambda r: r["n"]), wanted="n"
    )


def drip(connection: socket.socket, head: bytes = HEAD + b"\r\n") -> None:
    connection.sendall(head)
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (lambda c: c.close(), "no n in 2 attempts; last: "),
        (lambda c: c.shutdown(socket.SHUT_WR), "no n in 2 attempts"),
        (lambda c: c.sendall(b"SSH-2.0-x\r\n\r\n"), "no n in 2 attempts"),
        (lambda c: c.sendall(HEAD + b'Content-Length: 99\r\n\r\n{"n": 1}'), "IncompleteRead"),
        (
            lambda c: c.sendall(HEAD + b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"n": 1}\r\n'),
            "IncompleteRead",
        ),
        (lambda c: c.sendall(HEAD + b'\r\n{"n": '), "not a reply"),
        (lambda c: c.sendall(HEAD + b"\r\n" + b"[" * 100_000), "not a reply"),
        (lambda c: c.sendall(HEAD + b"\r\n\xff\xfe"), "not a reply"),
        (lambda c: c.sendall(HEAD + b"\r\n[1]"), "not a reply"),
        (lambda c: c.sendall(b"HTTP/1.1 500 x\r\nContent-Length: 9\r\n\r\nab"), "HTTP 500: ab"),
    ],
)
def test_broken_replies(raw: Any, reply: Callable[[socket.socket], None], said: str) -> None:
    with pytest.raises(ServerError, match="no n in 2 attempts") as error:
        ask(raw(reply))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("head", [b"", HEAD + b"X: ", HEAD + b"\r\n", b"HTTP/1.1 500 x\r\n\r\n"])
def test_slow_replies_end(raw: Any, head: bytes) -> None:
    """Each byte comes in time, and the whole would take ten seconds."""
    begun = time.monotonic()
    with pytest.raises(ServerError, match="no n in 2 attempts"):
        ask(raw(lambda connection: drip(connection, head)), timeout=0.3)
    assert time.monotonic() - begun < 5


def test_large_replies_end(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "LARGEST", 2**20)
    with pytest.raises(ServerError, match="a reply of more than 1 MiB"):
        ask(raw(lambda connection: connection.sendall(HEAD + b"\r\n" + b" " * 2**22)))


def test_redirects_are_not_followed() -> None:
    with http_servers() as new:
        other, asked = new(lambda path, body, number: (200, b'{"n": 1}', {}))
        for status in (301, 302, 303, 307, 308):
            target = {"Location": f"{other}/x?token=t"}
            url, _ = new(lambda path, body, number, s=status, t=target: (s, b"", t))
            with pytest.raises(ServerError, match=f"HTTP {status}: redirects to .*final") as error:
                ask(url)
            assert "token=" not in str(error.value)
        assert not asked, "nobody else gets the key"


def test_what_a_server_says_is_one_plain_line_without_the_key() -> None:
    told = f"bad key {KEY}\n\x1b[2Jerror: \x07 done"
    with http_servers() as new:
        url, asked = new(lambda path, body, number: (401, told.encode(), {}))
        with pytest.raises(ServerError) as error:
            ask(url)
    assert asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert str(error.value).endswith("HTTP 401: bad key … [2Jerror: done")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_again(status: int) -> None:
    with http_servers() as new:
        url, asked = new(lambda p, b, number: (200 if number > 1 else status, b'{"n": 7}', {}))
        assert ask(url) == 7 and len(asked) == 2


@pytest.mark.parametrize(
    "url",
    [
        "x",
        "",
        "ftp://h/v1",
        "file:///etc/passwd",
        "http://",
        "http:///v1",
        "http://h:port/v1",
        "http://h:99999/v1",
        "http://[::1/v1",
        "http://h /v1",
        "http://h/v1\nX: y",
        "http://h\u0430/v1",
        "http://user@h/v1",
        "https://user:pass@h/v1",
        "http://:pass@h/v1",
        "http://h/v1?key=pass",
        "http://h/v1#pass",
    ],
)
def test_addresses_that_are_none_or_hold_more(url: str) -> None:
    with pytest.raises(InputError, match="needs an address") as error:
        Client(url, setting="sampling.url")
    assert "pass" not in str(error.value) or "passwd" in url
    sampling = {"engine": "vllm", "model": "m", "url": url}
    with pytest.raises(ValidationError):
        Config.model_validate({"sampling": sampling})
    assert Config.model_validate({"sampling": sampling}, context=RECORDED).sampling.url == url


@pytest.mark.parametrize("url", ["http://h/v1", "HTTPS://h:8000/v1/", "http://[::1]:8000/v1"])
def test_addresses(url: str) -> None:
    assert checked_address(url) == url.rstrip("/")


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="not the key that is in it"):
        judge = {"kind": "server", "url": "http://h", "model": "m", "key_variable": "sk-abc"}
        Config.model_validate({"judge": judge})
    with pytest.raises(InputError, match=r"= hf_s…: is not set"):
        key_of("hf_secretsecret", "judge.key_variable")
    monkeypatch.setenv("MINE", f" {KEY}\n")
    assert key_of("MINE", "x") == KEY
    for bad in ("a b", "a\nb", "ключ"):
        monkeypatch.setenv("MINE", bad)
        with pytest.raises(InputError, match="= MINE: has signs that no key has") as error:
            key_of("MINE", "x")
        assert bad not in str(error.value)
    assert key_of(None, "x") is None


def test_nan_is_no_number_of_a_reply() -> None:
    reply = b'{"n": NaN}'
    assert json.loads(reply)["n"] != json.loads(reply)["n"], "Python's reader takes it"
    with pytest.raises(ValueError, match="not a reply"):
        parsed(reply, "reply", lambda r: r["n"])
