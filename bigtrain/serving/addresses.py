"""Pictures behind http(s) addresses, of the public network only unless allowed: an address in a list of pictures must
not make this machine ask its own network."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import urllib.error
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from bigtrain.images import UnreadableError

SCHEMES = ("http", "https")
WITHIN_S = 20.0
MAX_BYTES = 256 << 20


class PrivateAddressError(ValueError):
    """An address that leads into the private network."""


def is_address(text: str) -> bool:
    return "://" in text


def check_public(address: str, *, may_be_private: bool = False) -> None:
    """Refuse an http(s) address whose host is, by name or number, in a private network.

    Raises:
        ValueError: it is, or it has no host.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or 0
    except ValueError as error:
        raise ValueError(f"{address} is no address ({error}): give http://HOST/....") from error
    if parts.scheme not in SCHEMES or may_be_private:
        return
    if not host:
        raise ValueError(f"{address} names no host: give http://HOST/....")
    try:
        public_place(host, port)
    except OSError as error:
        raise ValueError(f"{address}: its host is not known ({error}): check the address.") from error


def public_place(host: str, port: int, *, may_be_private: bool = False) -> tuple[Any, ...]:
    """The first socket address of a host, all of which must be public. Raises PrivateAddressError or OSError."""
    places = [found[4] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for place in places:
        number = ipaddress.ip_address(str(place[0]).partition("%")[0])
        number = getattr(number, "ipv4_mapped", None) or number
        if not may_be_private and (not number.is_global or number.is_multicast):
            raise PrivateAddressError(
                f"{host} leads to {number} in a private network, which is not asked: --allow-private allows it."
            )
    return places[0]


def fetched(address: str, *, may_be_private: bool = False, max_bytes: int = MAX_BYTES) -> bytes:
    """What an http(s) address answers.

    Raises:
        UnreadableError: another kind of address, a private one, no answer, an error, or more than `max_bytes`.
    """
    if not address.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise UnreadableError(f"an address of a picture begins with http:// or https://, and this is {address[:200]}")
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "bigtrain"})
        with _opener(may_be_private).open(request, timeout=WITHIN_S) as answer:
            payload = answer.read(max_bytes + 1)
    except PrivateAddressError as error:
        raise UnreadableError(str(error)) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, PrivateAddressError):
            raise UnreadableError(str(error.reason)) from error
        raise UnreadableError(f"no picture came: {error}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreadableError(f"no picture came: {type(error).__name__}: {error}") from error
    if len(payload) > max_bytes:
        raise UnreadableError(f"not a picture: more than {max_bytes} bytes came")
    return payload


def _opener(may_be_private: bool) -> urllib.request.OpenerDirector:
    """What follows redirections too, and connects to the very number that was checked: a name that is looked up twice
    could lead elsewhere the second time. Proxies are not used, for what they lead to cannot be checked."""

    def connection(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        class Checked(kind):  # type: ignore[valid-type, misc]
            def _create_connection(self, place: tuple[str, int], *further: Any) -> socket.socket:
                checked = public_place(*place, may_be_private=may_be_private)
                return socket.create_connection(checked[:2], *further)

            def connect(self) -> None:
                self.__dict__["_create_connection"] = partial(Checked._create_connection, self)
                super().connect()

        return Checked

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(connection(http.client.HTTPConnection), request)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(connection(http.client.HTTPSConnection), request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        Plain, Secure, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener
