"""Clips and pictures that a request names: data URLs, addresses, files. What a stranger may not see is refused."""

import base64
import binascii
import io
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

import urllib3

from ..video.reader import ClipError, spooled

_REDIRECTS = 5
_PART = 1 << 22  # characters of base64 that are decoded at once, so that other requests go on between


class RequestError(ValueError):
    """A request that cannot be answered as it stands.

    Attributes:
        status: of HTTP.
        param: the part of the request that is meant.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class MediaAccess:
    """What requests may name.

    Attributes:
        folder: files below it may be named; None: no file.
        hosts: names, addresses and networks inside one's own network that clips are fetched from, beside public ones.
        most_bytes: of a clip that is fetched.
        timeout: seconds that fetching may take.
    """

    folder: Path | None = None
    hosts: Sequence[str] = ()
    most_bytes: int = 1 << 31
    timeout: float | None = 300.0

    def open(self, url: Any, param: str) -> str | BinaryIO:
        """A clip or picture: the path of a file, or what was sent or fetched.

        Args:
            param: where the request names it.

        Raises:
            RequestError: if it may not be had, or is not there.
        """
        if not isinstance(url, str) or not url:
            raise RequestError(f"{param} must be a data URL, an address or a path; found {str(url)[:80]}", param=param)
        if url.startswith("data:"):
            return io.BytesIO(_decode(url, param))
        if re.match(r"https?://", url):
            return self._fetch(url, param)
        if "://" in url and not url.startswith("file://"):
            raise RequestError(f"{param}: {url[:80]}: only http, https, file and data addresses are read", param=param)
        return self._file(unquote(url.removeprefix("file://")) if url.startswith("file://") else url, param)

    def _file(self, path: str, param: str) -> str:
        if self.folder is None:
            raise RequestError(f"{param}: this server reads no files; send the clip as a data URL", 403, param)
        folder = self.folder.resolve()
        found = [Path(path).resolve(), (folder / path).resolve()]  # as the server stands, or inside the folder
        inside = [each for each in found if each.is_relative_to(folder)]
        if not inside:
            raise RequestError(f"{param}: {path} is outside the folder whose files may be asked about", 403, param)
        for each in inside:
            if each.is_file():
                return os.fspath(each)
        raise RequestError(f"{param}: no file {path}", param=param)

    def _fetch(self, url: str, param: str) -> BinaryIO:
        for _ in range(_REDIRECTS):
            try:
                answer = self._get(url, param)
                if answer.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, answer.headers.get("Location", ""))
                    answer.close()
                    continue
                if answer.status != 200:
                    raise RequestError(f"{param}: {url[:200]} answers with status {answer.status}", param=param)
                return spooled(answer, self.most_bytes, self.timeout)
            except urllib3.exceptions.HTTPError as error:
                raise RequestError(f"{param}: {url[:200]} cannot be fetched: {error}", param=param) from error
            except ClipError as error:
                too_large = "more than" in str(error)
                raise RequestError(f"{param}: {error}", 413 if too_large else 400, param) from error
        raise RequestError(f"{param}: {url[:200]} leads on more than {_REDIRECTS} times", param=param)

    def _get(self, url: str, param: str) -> Any:
        """Ask the very address that was checked, so that a name cannot stand for another one the next moment."""
        parts = urlsplit(url)
        host = parts.hostname
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
        except (ValueError, OSError):
            found = []
        if parts.scheme not in ("http", "https") or not found:
            raise RequestError(f"{param}: {url[:200]} is no address that can be found", param=param)
        address = found[0][4][0]
        if not self._may_ask(host, address):
            raise RequestError(
                f"{param}: {host} is not public; a server that may fetch from it has it in api_allowed_hosts",
                403,
                param,
            )
        options: dict[str, Any] = {"timeout": urllib3.Timeout(connect=10, read=self.timeout), "retries": False}
        if parts.scheme == "https":
            pool = urllib3.HTTPSConnectionPool(address, port, server_hostname=host, assert_hostname=host, **options)
        else:
            pool = urllib3.HTTPConnectionPool(address, port, **options)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "llamafactory-video"}
        return pool.request("GET", path, headers=headers, redirect=False, preload_content=False)

    def _may_ask(self, host: str, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if ip.is_global and not ip.is_multicast:
            return True
        for allowed in self.hosts:
            try:
                if ip in ipaddress.ip_network(allowed, strict=False):
                    return True
            except ValueError:  # a name
                if host == allowed.lower():
                    return True
        return False


def _decode(url: str, param: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(f"{param}: a data URL must be data:<type>;base64,<data>; found {head[:80]}", param=param)
    try:
        parts = (data[at : at + _PART] for at in range(0, len(data), _PART))
        return b"".join(base64.b64decode(part, validate=True) for part in parts)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param}: its data is not base64 ({error})", param=param) from None
