"""One HTTP call, distrusting both ends: only http(s), a bounded size and time, the key to its own host only.

Says whether a failed call can have reached the service; whether to repeat it is http_job.py's decision.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import os
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from afd.teachers.http_spec import origin_of, require_http

_CHUNK = 1 << 16
_MAX_RETRY_AFTER_S = 900.0


class NotSentError(Exception):
    """The service cannot have seen the call."""


class LostError(Exception):
    """The call broke off, or its answer is damaged: the service may have acted on it."""


class RefusedError(Exception):
    """Something we will not do: a redirect to another scheme, a body over the limit."""


@dataclass(frozen=True)
class Answer:
    """Status, headers (names in lower case) and body of an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after_s(self) -> float | None:
        """The pause the service asks for, s, at most a quarter of an hour; given in seconds or as a date."""
        text = self.headers.get("retry-after", "").strip()
        try:
            seconds = float(text)
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(text)
            except (ValueError, TypeError):
                return None
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if seconds == seconds else None


class Key:
    """A secret that shows itself in no text."""

    def __init__(self, header: str, value: str, secret: str) -> None:
        if not secret or any(ord(character) < 33 or ord(character) > 126 for character in secret):
            raise ValueError("the key must be printable ASCII without spaces")  # it is not shown
        self.header, self._value, self._secret = header, value, secret

    def __repr__(self) -> str:
        return "Key(***)"

    def as_header(self) -> tuple[str, str]:
        """The header line; the only way out."""
        return self.header, self._value.replace("{key}", self._secret)

    def redact(self, text: str) -> str:
        """Remove the secret, plain or percent-encoded, from a text that others wrote."""
        for form in (self._secret, urllib.parse.quote(self._secret, safe="")):
            text = text.replace(form, "***")
        return text

    def is_in(self, text: str) -> bool:
        """Whether a text holds the secret."""
        return self.redact(text) != text


class Transport:
    """Makes calls; safe to share between threads.

    Args:
        key: sent only where a call asks for it and only to `origins`.
        origins: `scheme://host:port` of the service.
        timeout_s: without progress; limit_s: in all, s.
    """

    def __init__(self, *, key: Key | None, origins: frozenset[str], timeout_s: float, limit_s: float) -> None:
        self._key, self._origins = key, origins
        self._timeout_s, self._limit_s = timeout_s, limit_s
        # Without the handlers of file:, ftp: and data: that urllib's own opener has.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirects(key, origins),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        send_key: bool = True,
        max_bytes: int,
    ) -> Answer:
        """Make a call and read its whole answer, whatever its status.

        Raises:
            NotSentError, LostError, RefusedError: there is no whole answer.
        """
        deadline = time.monotonic() + self._limit_s
        status, answered, response = self._open(method, url, headers, body, send_key)
        with response:
            return Answer(status, answered, b"".join(self._read(response, answered, max_bytes, deadline)))

    def download(
        self, url: str, target: Path, *, headers: Mapping[str, str], send_key: bool, max_bytes: int
    ) -> tuple[int, str] | Answer:
        """Save a 2xx answer's body as `target`, which appears whole or not at all.

        Returns:
            Its size and sha256; or the answer (its first 64 KiB), where the status is no 2xx.
        Raises:
            NotSentError, LostError, RefusedError: there is no whole answer.
        """
        deadline = time.monotonic() + self._limit_s
        status, answered, response = self._open("GET", url, headers, None, send_key)
        with response:
            if not 200 <= status < 300:
                return Answer(status, answered, response.read(_CHUNK))
            return save_whole(target, self._read(response, answered, max_bytes, deadline))

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, send_key: bool
    ) -> tuple[int, dict[str, str], IO[bytes]]:
        request = urllib.request.Request(require_http(url), data=body, method=method)
        for name, value in {"User-Agent": "afd", "Accept": "*/*", **headers}.items():
            request.add_header(name, value)
        if send_key and self._key is not None and origin_of(url) in self._origins:
            # Unredirected, so that _Redirects decides where it goes.
            request.add_unredirected_header(*self._key.as_header())
        try:
            response = self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            response = error
        except urllib.error.URLError as error:
            kind = type(error.reason).__name__ if isinstance(error.reason, BaseException) else str(error.reason)
            never_left = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
            if isinstance(error.reason, never_left):
                raise NotSentError(f"cannot connect ({kind})") from error
            raise LostError(f"connection broke ({kind})") from error
        except (OSError, http.client.HTTPException) as error:
            raise LostError(f"no answer ({type(error).__name__})") from error
        answered = {name.lower(): value for name, value in response.headers.items()}
        return int(response.status or 0), answered, response

    def _read(self, response: Any, headers: Mapping[str, str], max_bytes: int, deadline: float) -> Iterator[bytes]:
        """Yield the body; a body shorter than promised is lost, not returned."""
        promised = headers.get("content-length", "")
        if promised.isdigit() and int(promised) > max_bytes:
            raise RefusedError(f"answer of {promised} bytes is over the limit of {max_bytes}")
        size = 0
        try:
            while chunk := response.read1(_CHUNK) if hasattr(response, "read1") else response.read(_CHUNK):
                size += len(chunk)
                if size > max_bytes:
                    raise RefusedError(f"answer is over the limit of {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise LostError(f"answer took longer than {self._limit_s:g} s")
                yield chunk
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LostError(f"answer broke off after {size} bytes ({type(error).__name__})") from error
        if promised.isdigit() and size != int(promised) and "content-encoding" not in headers:
            raise LostError(f"answer broke off after {size} of {promised} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a GET to http(s) only, never from https to http; the key goes on only to the service's own host."""

    max_redirections = max_repeats = 5

    def __init__(self, key: Key | None, origins: frozenset[str]) -> None:
        self._key, self._origins = key, origins

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Make the next request, or None to hand the redirect itself back."""
        if req.get_method() not in ("GET", "HEAD"):
            return None
        try:
            require_http(newurl)
        except ValueError as error:
            raise RefusedError(f"redirect refused: {error}") from error
        if origin_of(req.full_url).startswith("https:") and not newurl.startswith("https:"):
            raise RefusedError("redirect refused: from https to http")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        had_key = self._key is not None and self._key.header.capitalize() in req.unredirected_hdrs
        if following is not None and had_key and self._key and origin_of(newurl) in self._origins:
            following.add_unredirected_header(*self._key.as_header())
        return following

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """urllib checks the scheme itself first, with an error of another kind."""
        target = headers.get("location") or headers.get("uri") or ""
        scheme = urllib.parse.urlsplit(target).scheme
        if scheme not in ("", "http", "https"):
            raise RefusedError(f"redirect refused: to a {scheme[:20]}: address")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def save_whole(target: Path, chunks: Iterator[bytes]) -> tuple[int, str]:
    """Write, sync and rename; return the size and the sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return size, digest.hexdigest()
