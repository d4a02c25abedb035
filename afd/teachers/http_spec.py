"""What a YAML file says about a generation service: where to submit, poll and download, and how to read the answers.

Templates hold `{prompt}`, `{seed}`, `{short_prompt}`, `{reference}` (our own name of the request) and whatever
`capture` takes from an answer. A JSON path is dotted, with numbers for places in lists: `data.0.url`.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from afd.config.section import Section
from afd.config_file import parse_yaml

REQUEST_NAMES = ("prompt", "seed", "short_prompt", "reference")
_PLACEHOLDER = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
_MAX_CAPTURED = 4096
Words = tuple[str | int | bool, ...]
Seconds = Annotated[float, Field(gt=0)]


class AuthSpec(Section):
    """The header that carries the key."""

    env: str
    """Environment variable that holds the key; the key itself is never written anywhere."""
    header: str = "Authorization"
    """Its name."""
    value: str = "Bearer {key}"
    """Its value."""


class CallSpec(Section):
    """One kind of call and what to keep of its answer."""

    method: Literal["GET", "POST", "PUT"] = "GET"
    """HTTP method."""
    url: str
    """Template of the address; a template that is one captured name takes that address as it is."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further headers; values are templates."""
    body: Any = None
    """JSON body; strings in it are templates, and "{seed}" alone becomes a number."""
    capture: dict[str, str] = Field(default_factory=dict)
    """Name -> JSON path in the answer, for later templates; each must be there."""
    ok_path: str | None = None
    """JSON path of the service's own code, where it answers errors with HTTP 200."""
    ok: Words = ()
    """Values at ok_path that mean success."""
    error: str | None = None
    """JSON path of the message of a failure."""


class SubmitSpec(CallSpec):
    """The call that costs money."""

    method: Literal["GET", "POST", "PUT"] = "POST"
    """HTTP method."""
    busy: Words = ()
    """Values at ok_path that mean "not now": nothing was accepted, try again later."""
    busy_status: tuple[int, ...] = (429,)
    """HTTP statuses that mean the same. Add 503 only if the service promises that it has then done nothing."""
    idempotency_header: str | None = None
    """Header in which the service takes an idempotency key: a repeated submit then returns the first one's answer."""
    idempotency_ttl_s: Seconds = 86_400.0
    """How long the service remembers such a key, s."""


class LookupSpec(CallSpec):
    """Finding a submitted request by our own reference, where the service allows it."""

    missing_status: tuple[int, ...] = (404,)
    """HTTP statuses that mean that it was never accepted."""
    missing: Words = ()
    """Values at ok_path that mean the same."""
    settle_s: Annotated[float, Field(ge=0)] = 10.0
    """How long after a submit the service surely knows it, s."""


class PollSpec(CallSpec):
    """Asking how far a request is."""

    status: str
    """JSON path of the status word."""
    running: Words = ()
    """Words for "not yet"; an absent status is one of them."""
    done: Words
    """Words for "finished"."""
    failed: Words = ()
    """Words for "will never finish"."""
    failed_if: str | None = None
    """JSON path that is there (and not null or empty) only after a failure."""
    every_s: Seconds = 5.0
    """Pause between polls, s."""
    timeout_s: Seconds = 3600.0
    """How long one run waits for one request, s; the next run goes on waiting."""


class ResultSpec(Section):
    """Where the finished video is."""

    kind: Literal["url", "file", "base64"] = "url"
    """`url`: an address in the last JSON answer, or `url` below; `file`: the submit's own body (no poll); `base64`:
    text in the last JSON answer."""
    path: str | None = None
    """JSON path of the address or of the base64 text."""
    url: str | None = None
    """Template of the address of a file that no answer names."""
    send_key: bool = False
    """Send the key with the download, as far as it goes to the service's own host."""


class HttpSpec(Section):
    """A whole service."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the service and its model, e.g. acme-video-2."""
    auth: AuthSpec | None = None
    """None for a service without keys."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with every call to the service."""
    cost_per_call: Annotated[float, Field(ge=0)] | None = None
    """Price of one accepted submit, in any unit; `max_cost` needs it."""
    failed_is_charged: bool = True
    """Whether a request that the service fails counts against the budget."""
    timeout_s: Seconds = 60.0
    """Longest time of one call without progress, s."""
    call_limit_s: Seconds = 900.0
    """Longest time of one call, s."""
    submit: SubmitSpec
    lookup: LookupSpec | None = None
    poll: PollSpec | None = None
    """None where the submit's own answer holds the video."""
    fetch: CallSpec | None = None
    """A further call between the last poll and the download, where the poll gives only a file's id."""
    result: ResultSpec

    @property
    def version(self) -> str:
        """Changes with what decides the video: the submit's address and body."""
        decisive = json.dumps([self.name, self.submit.url, self.submit.body], sort_keys=True, default=str)
        return hashlib.sha256(decisive.encode()).hexdigest()[:12]

    @property
    def origins(self) -> frozenset[str]:
        """The hosts the key may be sent to: those written in the file itself."""
        calls = [call.url for call in (self.submit, self.lookup, self.poll, self.fetch) if call]
        urls = [*calls, *([self.result.url] if self.result.url else [])]
        return frozenset(origin_of(url) for url in urls if not url.startswith("{"))


def load_spec(path: Path) -> HttpSpec:
    """Read and check a service's YAML.

    Raises:
        ValueError: missing, no YAML, an unknown or missing field, or a template with an unknown name.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"teacher.http.spec {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(tree).__name__}")
    try:
        spec = HttpSpec(**tree)
        _check(spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}, got {str(first['input'])[:80]!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return spec


def _check(spec: HttpSpec) -> None:
    """What the fields cannot check one by one."""
    known = set(REQUEST_NAMES)
    for label in ("submit", "lookup", "poll", "fetch"):
        call: CallSpec | None = getattr(spec, label)
        if call is None:
            continue
        for text in _strings([call.url, call.headers, call.body]):
            unknown = set(_PLACEHOLDER.findall(text)) - known
            if unknown:
                raise ValueError(f"{label}: unknown name {{{min(unknown)}}}, known are {', '.join(sorted(known))}")
        if not call.url.startswith("{"):
            require_http(call.url)
        if set(call.capture) & set(REQUEST_NAMES):
            raise ValueError(f"{label}.capture must not redefine {', '.join(REQUEST_NAMES)}")
        known |= set(call.capture)
        if (call.ok_path is None) != (not call.ok):
            raise ValueError(f"{label}: ok_path and ok go together")
    if spec.lookup is not None and set(spec.submit.capture) - set(spec.lookup.capture):
        raise ValueError(f"lookup.capture must give what submit.capture gives: {sorted(spec.submit.capture)}")
    result = spec.result
    if (result.kind == "base64" and not result.path) or (result.kind == "url" and not (result.path or result.url)):
        raise ValueError(f"result.path must say where the answer holds the {result.kind}")
    if result.kind == "file" and (spec.poll or spec.fetch):
        raise ValueError("result.kind file is a submit that answers with the video: poll and fetch must be absent")
    if spec.poll is None and spec.submit.capture and spec.lookup:
        raise ValueError("lookup needs poll: without it the submit's own answer is the only one")
    if spec.auth is not None and "{key}" not in spec.auth.value:
        raise ValueError("auth.value must hold {key}: the key comes from the environment, never from this file")


def _strings(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return [text for value in values for text in _strings(value)]


def fill(tree: Any, values: Mapping[str, Any]) -> Any:
    """Fill a body's or header's templates; a text that is one name alone becomes the value itself, type and all."""
    if isinstance(tree, str):
        alone = _PLACEHOLDER.fullmatch(tree)
        if alone and alone[1] in values:
            return values[alone[1]]
        return _PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), tree)
    if isinstance(tree, Mapping):
        return {key: fill(value, values) for key, value in tree.items()}
    return [fill(value, values) for value in tree] if isinstance(tree, list | tuple) else tree


def fill_url(template: str, values: Mapping[str, Any]) -> str:
    """Fill an address: values are percent-encoded, and may not climb out of their place in the path.

    Raises:
        ValueError: the result is no http(s) address, or a captured value holds `..`.
    """
    alone = _PLACEHOLDER.fullmatch(template)
    if alone:
        return require_http(str(values[alone[1]]))

    def encode(match: re.Match[str]) -> str:
        name = match[1]
        text = str(values[name])
        if name not in REQUEST_NAMES and ".." in text.split("/"):
            raise ValueError(f"{name} from the service's answer must be no path with .., got {text[:80]!r}")
        return urllib.parse.quote(text, safe="" if name in REQUEST_NAMES else "/:")

    return require_http(_PLACEHOLDER.sub(encode, template))


def require_http(url: str) -> str:
    """Return the address if it is http or https, has a host, no user and no odd characters.

    Raises:
        ValueError: it is anything else; the message does not hold its query, where signatures are.
    """
    shown = url.split("?", maxsplit=1)[0][:120]
    if any(character <= " " or character == "\x7f" for character in url):
        raise ValueError(f"address must not hold spaces or control characters, got {shown!r}")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError(f"address must be http(s)://host/..., got {shown!r}")
    return url


def origin_of(url: str) -> str:
    """Scheme, host and port."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def find(tree: Any, path: str) -> Any:
    """The value at a JSON path, None where there is none."""
    for part in filter(None, re.split(r"[.\[\]]+", path)):
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.lstrip("-").isdigit() and -len(tree) <= int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def is_one_of(value: Any, words: Words) -> bool:
    """Compare as JSON writes them, without case: true, "TRUE" and True are one word."""
    spelled = "" if value is None else str(value).lower()
    return any(spelled == str(word).lower() for word in words)


def captured(answer: Any, paths: Mapping[str, str]) -> dict[str, Any]:
    """Take the named values out of an answer.

    Raises:
        ValueError: one is missing, or no short text or number.
    """
    values = {}
    for name, path in paths.items():
        value = find(answer, path)
        if isinstance(value, bool) or not isinstance(value, str | int) or not 0 < len(str(value)) <= _MAX_CAPTURED:
            raise ValueError(f"the answer has no usable {name} at {path!r}")
        values[name] = value
    return values
