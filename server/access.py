"""Access control: API keys, and the host names and origins that are accepted."""

import hashlib
import hmac
import ipaddress
import os
import re
import socket
import stat
import time
from collections.abc import Mapping, MutableMapping, Sequence
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from configs.errors import UserError
from configs.reading import ordinary_file
from server.errors import ApiError

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")  # name and port, in small letters
ANY_ADDRESS = ("0.0.0.0", "::", "")
VARIABLE = "DIAGONAL_API_KEYS"
KEY = re.compile(r"[!-+\--~]{16,200}")  # ASCII without white space and commas
NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
MAX_KEYS, MAX_FILE = 10_000, 2**20
COOKIE = "diagonal_session"
COOKIE_SECONDS = 12 * 3600
NOBODY = "anyone"  # the owner of requests if there are no keys
FORM = "a key has 16 to 200 printable characters without white space and commas, and may follow a name and a space"


class Keys:
    """API keys and the names of their owners, which identify them in logs, jobs and limits.

    A browser, whose WebSocket cannot send a key, exchanges it for a cookie (`cookie`), which is signed with the key.
    """

    def __init__(self, by_owner: Mapping[str, str]):
        self._keys = {owner: key.encode() for owner, key in by_owner.items()}
        self._digests = {owner: hashlib.sha256(key).digest() for owner, key in self._keys.items()}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def owner(self, key: str) -> str | None:
        """The owner of a key, or None; takes equally long for all keys."""
        given, matching = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest(), None
        for owner, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                matching = owner
        return matching

    def cookie(self, owner: str, now: float | None = None) -> str:
        """A signed cookie for `owner`, valid for COOKIE_SECONDS."""
        expires = int((time.time() if now is None else now) + COOKIE_SECONDS)
        return f"{owner}|{expires}|{self._signature(owner, expires)}"

    def cookie_owner(self, cookie: str) -> str | None:
        """The owner of a cookie; None if it is expired, forged, or signed with a removed key."""
        owner, _, rest = cookie.partition("|")
        expires, _, signature = rest.partition("|")
        if owner not in self._keys or not re.fullmatch("[0-9]{1,12}", expires) or not signature.isascii():
            return None
        genuine = hmac.compare_digest(signature, self._signature(owner, int(expires)))
        return owner if genuine and time.time() < int(expires) else None

    def _signature(self, owner: str, expires: int) -> str:
        return hmac.new(self._keys[owner], f"{owner}|{expires}".encode(), hashlib.sha256).hexdigest()


def read_keys(path: str | None, environ: MutableMapping[str, str] = os.environ) -> Keys:
    """The keys of a file and of the environment variable, one a line or with commas between, `KEY` or `NAME KEY`.

    The variable is removed from `environ`, so that child processes do not inherit it. Raises UserError, which contains
    no key, for a file that other users may read, and for invalid keys.
    """
    texts = {VARIABLE: environ.pop(VARIABLE, "")}
    if path is not None:
        ordinary_file("--keys_file", path, MAX_FILE, fix="give a file with a key a line")
        if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"--keys_file={path} can be read by other users of this machine; chmod 600 it")
        texts[f"--keys_file={path}"] = Path(path).read_bytes().decode("utf-8-sig", "replace")
    by_owner: dict[str, str] = {}
    for where, text in texts.items():
        lines = [entry for line in text.splitlines() for entry in line.partition("#")[0].split(",")]
        for number, words in enumerate((entry.split() for entry in lines if entry.strip()), start=1):
            owner, key = (words[0], words[-1]) if len(words) == 2 else (None, words[-1])
            if len(words) > 2 or not KEY.fullmatch(key) or (owner is not None and not NAME.fullmatch(owner)):
                raise UserError(f"{where} has an entry {number} that is no key: {FORM}")
            owner = owner or f"key-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
            if owner in by_owner or key in by_owner.values() or len(by_owner) >= MAX_KEYS:
                raise UserError(f"{where} has an entry {number} whose name or key is there already; remove one of them")
            by_owner[owner] = key
    if path is not None and not by_owner:
        raise UserError(f"--keys_file={path} holds no key; {FORM}")
    return Keys(by_owner)


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_access(host: str, keys: Keys, origins: Sequence[str] = ()) -> None:
    """Raise a UserError if other machines could connect without keys. origins: addresses of a proxy with the page."""
    fix = f"give --keys_file FILE or set {VARIABLE}"
    if not is_loopback(host) and not keys:
        raise UserError(f"--host={host} can be reached from other machines; {fix}, or use 127.0.0.1")
    for origin in origins:
        scheme, _, place = origin.partition("://")
        if scheme not in ("http", "https") or not HOST.fullmatch(place):
            raise UserError(f"--allow_origin={origin} is no origin; give scheme and host only, https://demo.example.org")
        if not keys:
            raise UserError(f"--allow_origin={origin} can be reached from other machines; {fix} as well")


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the port is in use or the address is not of this machine."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # two sockets may be bound to one port as long as neither listens
    except (OSError, OverflowError, TypeError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port or host"
        raise UserError(f"--port={port} on {host} cannot be used ({reason}); give another --port or --host") from error
    return listener


def address(host: str, port: int) -> str:
    """The URL for a browser."""
    host = host.strip("[]")
    name = "localhost" if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


class AccessPolicy:
    """Checks requests and identifies their owners.

    Requests need a key if there are keys. Pages of other sites are refused, by the Host header, by `origins`, or,
    behind a proxy and with keys, by X-Forwarded-Host, which pages of other sites cannot set.
    local: accept only host names of this machine and those in `origins`.
    """

    def __init__(self, keys: Keys, local: bool, origins: Sequence[str] = ()):
        self.keys, self.local, self.origins = keys, local, frozenset(origins)
        self._names = {origin.partition("://")[2] for origin in origins}

    def check_place(self, headers: Mapping[str, str]) -> None:
        """Raise an ApiError for another host name, and for a page of another site."""
        host = headers.get("host", "").lower()
        name = HOST.fullmatch(host)
        if name is None:
            raise _refused("Host is malformed; use the address that was printed when the server started", "host")
        if self.local and not is_loopback(name[1]) and host not in self._names:
            raise _refused(f"host={name[1][:60]} is not this machine; use localhost, or see --allow_origin", "host")
        origin = headers.get("origin")
        if origin is not None and not self._own(origin.lower(), host, headers.get("x-forwarded-host", "")):
            fix = "open its own page, or start it with --allow_origin"
            raise _refused(f"another site's page may not use this server; {fix}", "origin")

    def owner(self, headers: Mapping[str, str]) -> str:
        """The owner by key or cookie. Raises ApiError without a valid one."""
        if not self.keys:
            return NOBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme:
            owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        else:
            owner = self.keys.cookie_owner(_cookie(headers.get("cookie", "")))
        if owner is None:
            said = "wrong" if scheme else "missing"
            message = f"the API key is {said}; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner

    def _own(self, origin: str, host: str, forwarded: str) -> bool:
        """Whether `origin` is that of the server's own page."""
        place = origin.partition("://")[2]
        names = {host, *(name.strip() for name in forwarded.lower().split(","))} if self.keys else {host}
        return origin in self.origins or (HOST.fullmatch(place) is not None and place in names)


def _refused(message: str, code: str) -> ApiError:
    return ApiError(403, message, code=f"{code}_not_allowed")


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if morsel is None else morsel.value
