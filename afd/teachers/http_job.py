"""One request from intent to video: submit once, poll until it ends, download. Blocks; one thread runs one request.

The submit is the only call that costs: it is written to the journal before it is made, and repeated only where the
service surely did not accept the first one, or surely recognises the second (idempotency key, look-up by reference).
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import random
import time
import uuid
from pathlib import Path
from typing import Any

from afd.teachers.base import VideoRequest
from afd.teachers.http_service import RejectedError, Service, UnusableError, read_json
from afd.teachers.http_spec import captured, fill_url, find, is_one_of
from afd.teachers.http_transport import Answer, LostError, NotSentError, RefusedError, save_whole

logger = logging.getLogger(__name__)


class Job:
    """One request of a service."""

    def __init__(self, service: Service, request: VideoRequest) -> None:
        self._service, self._request = service, request
        self._spec, self._journal, self._name = service.spec, service.journal, request.source_id
        self._target = service.folder / f"{self._name}.mp4"
        self._values: dict[str, Any] = {
            "prompt": request.prompt,
            "seed": request.seed,
            "short_prompt": request.short_prompt or request.prompt,
            "reference": self._name,
        }

    def run(self) -> Path:
        """Return the video's file, asking (and paying) for it only if no earlier run has.

        Raises:
            RejectedError, UnusableError, StoppedError, BudgetUsedUpError
        """
        entry = self._journal.entry(self._name)
        if entry.stage == "failed":
            raise RejectedError(entry.reason, is_final=True)
        if entry.stage == "done" and self._target.is_file():
            return self._target
        answer = None
        if entry.stage == "done" and self._spec.poll is None and not self._service.may_resubmit:
            raise RejectedError(f"was paid for and saved, but {self._target.name} is gone", is_final=False)
        if entry.stage not in ("submitted", "done") or self._spec.poll is None:
            answer = self._submit()
        self._values |= self._journal.entry(self._name).captured
        return self._collect(answer)

    def _submit(self) -> Answer | None:
        """Bring the request to `submitted`; returns the submit's answer, or None where a look-up found it."""
        last = "no attempt"
        for attempt in range(self._service.patience.retries + 1):
            is_charged = True
            if self._journal.entry(self._name).stage == "intent":
                if self._look_up():
                    return None
                is_charged = self._journal.entry(self._name).stage != "intent" or self._may_charge_again()
            self._service.sleep(self._service.rate.reserve_s())
            self._journal.intend(
                self._name, is_charged=is_charged, prompt=self._request.prompt, seed=self._request.seed
            )
            answer, last = self._submit_once()
            if not last:
                return answer
            logger.info("%s: %s", self._name, last)
            if attempt < self._service.patience.retries:
                self._service.sleep(self._service.patience.pause_s(attempt, answer))
        if self._journal.entry(self._name).stage == "intent":
            last = f"outcome of the submit is unknown, it may have been paid for ({last})"
        raise RejectedError(last, is_final=False)

    def _submit_once(self) -> tuple[Answer | None, str]:
        """Make the call that costs and write down what became of it."""
        call, headers = self._spec.submit, {}
        if call.idempotency_header:
            headers[call.idempotency_header] = self._idempotency_key()
        try:
            answer = self._service.call(call, self._values, headers)
        except (NotSentError, ValueError) as error:  # ValueError: the request could not even be built
            self._journal.refused(self._name, self._service.clean(error))
            return None, self._service.clean(error)
        except LostError as error:
            return None, str(error)
        except RefusedError as error:  # the answer came, and is over our limit
            raise RejectedError(f"outcome of the submit is unknown: {error}", is_final=False) from error
        if answer.status in call.busy_status:
            self._journal.refused(self._name, f"busy: HTTP {answer.status}")
            return answer, f"busy: HTTP {answer.status}"
        if answer.status // 100 in (3, 4) and answer.status != 409:
            raise self._refusal(answer)
        if answer.status // 100 != 2:
            return answer, f"HTTP {answer.status}"
        return answer, self._read_submit(answer)

    def _refusal(self, answer: Answer) -> Exception:
        """A definite no: of this request, or of all."""
        reason = f"submit refused: HTTP {answer.status} {self._service.message(answer)}".strip()
        self._journal.refused(self._name, reason)
        if answer.status in (400, 413, 422, 451):
            return RejectedError(reason, is_final=True)
        return UnusableError(reason)

    def _read_submit(self, answer: Answer) -> str:
        """Take what polling needs out of a 2xx answer; "" when all is there.

        An answer that holds the video itself is no outcome yet: only the saved video is.
        """
        call = self._spec.submit
        if self._spec.result.kind == "file":
            return ""
        try:
            tree = json.loads(answer.body)
        except (ValueError, RecursionError):
            return "submit answered with malformed JSON"
        if call.ok_path is not None and not is_one_of(code := find(tree, call.ok_path), call.ok):
            reason = f"submit refused: {call.ok_path} is {self._service.clean(code)}: {self._service.message(answer)}"
            self._journal.refused(self._name, reason)
            if is_one_of(code, call.busy):
                return reason
            raise RejectedError(reason, is_final=True)
        try:
            values = captured(tree, call.capture)
        except ValueError as error:
            return f"submit: {error}"
        if self._spec.poll is not None:
            self._keep(values)
        self._values |= values
        return ""

    def _keep(self, values: dict[str, Any]) -> None:
        if self._service.key and any(self._service.key.is_in(str(value)) for value in values.values()):
            raise UnusableError("the service's answer repeats the key where an id should be")
        self._journal.submitted(self._name, values)

    def _look_up(self) -> bool:
        """Settle an unknown outcome by our reference, if the service can; True: it was accepted."""
        call, entry = self._spec.lookup, self._journal.entry(self._name)
        if call is None:
            return False
        self._service.sleep(max(0.0, entry.intent_unix_s + call.settle_s - time.time()))
        answer = self._service.repeat(call, self._values, "look-up", allowed=call.missing_status)
        if answer.status in call.missing_status:
            self._journal.absent(self._name)
            return False
        tree = read_json(answer)
        if call.ok_path is not None and not is_one_of(code := find(tree, call.ok_path), call.ok):
            if is_one_of(code, call.missing):
                self._journal.absent(self._name)
                return False
            raise RejectedError(f"look-up: {call.ok_path} is {self._service.clean(code)}", is_final=False)
        try:
            self._keep(captured(tree, call.capture))
        except ValueError as error:
            raise RejectedError(f"look-up: {error}", is_final=False) from error
        return True

    def _may_charge_again(self) -> bool:
        """Whether the repetition of an unknown submit counts: not with a live idempotency key; else only if allowed.

        Raises:
            RejectedError: it might pay twice, and that is not allowed.
        """
        call, entry = self._spec.submit, self._journal.entry(self._name)
        if call.idempotency_header and time.time() - entry.key_unix_s < call.idempotency_ttl_s:
            return False
        if self._service.may_resubmit:
            return True
        raise RejectedError(
            "outcome of the submit is unknown, it may have been paid for: look it up at the service, or set "
            "teacher.http.on_unknown: resubmit to risk paying twice",
            is_final=False,
        )

    def _idempotency_key(self) -> str:
        """The same for every repetition of one intent, another after each definite refusal."""
        refusals = self._journal.entry(self._name).num_refused
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self._name}:{refusals}"))

    def _collect(self, answer: Answer | None) -> Path:
        """Poll until the request ends, then download; after a failed download, poll for a fresh address."""
        last, is_in_answer = "", self._spec.poll is None and self._spec.result.kind != "url"
        for attempt in range(1 if is_in_answer else self._service.patience.retries + 1):
            if attempt:
                self._service.sleep(self._service.patience.pause_s(attempt - 1, None))
            if self._spec.poll is not None:
                answer = self._poll()
            if answer is None:
                raise RejectedError("was accepted, but its answer, which held the video, is lost", is_final=False)
            try:
                sha256 = self._save(self._fetch(answer))
                self._service.check(self._target)
            except (LostError, NotSentError, ValueError) as error:
                last = f"download: {self._service.clean(error)}"
                logger.info("%s: %s", self._name, last)
                continue
            except RefusedError as error:
                raise RejectedError(f"download: {self._service.clean(error)}", is_final=True) from error
            self._journal.done(self._name, self._target.name, sha256)
            return self._target
        self._target.unlink(missing_ok=True)
        raise RejectedError(last, is_final=False)

    def _poll(self) -> Answer:
        """Ask until the status says finished or failed."""
        call = self._spec.poll
        assert call is not None
        deadline = time.monotonic() + call.timeout_s
        while True:
            answer = self._service.repeat(call, self._values, "poll")
            tree = read_json(answer)
            status = find(tree, call.status)
            if is_one_of(status, call.failed) or (call.failed_if and find(tree, call.failed_if)):
                reason = f"the service failed it: {self._service.clean(status)} {self._service.message(answer)}".strip()
                self._journal.failed(self._name, reason, is_charged=self._spec.failed_is_charged)
                raise RejectedError(reason, is_final=True)
            if is_one_of(status, call.done):
                try:
                    self._values |= captured(tree, call.capture)
                except ValueError as error:
                    raise RejectedError(f"poll: {error}", is_final=False) from error
                return answer
            if status is not None and not is_one_of(status, call.running):
                logger.warning("%s: status %s is not in the spec; waiting", self._name, self._service.clean(status))
            if time.monotonic() > deadline:
                raise RejectedError(f"not finished after {call.timeout_s:g} s; the next run waits on", is_final=False)
            self._service.sleep(call.every_s * random.uniform(0.9, 1.1))

    def _fetch(self, answer: Answer) -> Answer:
        """Make the call between poll and download, where there is one."""
        call = self._spec.fetch
        if call is None:
            return answer
        answer = self._service.repeat(call, self._values, "fetch")
        self._values |= captured(read_json(answer), call.capture)
        return answer

    def _save(self, answer: Answer) -> str:
        """Bring the video to its file; return its sha256."""
        result = self._spec.result
        if result.kind == "base64":
            text = find(read_json(answer), str(result.path))
            if not isinstance(text, str) or not text:
                raise ValueError(f"the answer has no base64 text at {result.path!r}")
            try:
                data = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"damaged base64: {error}") from error
            return save_whole(self._target, iter([data]))[1]
        if result.kind == "file":
            return save_whole(self._target, iter([answer.body]))[1]
        return self._download(answer)

    def _download(self, answer: Answer) -> str:
        result = self._spec.result
        if result.url is not None:
            url = fill_url(result.url, self._values)
        else:
            url = find(read_json(answer), str(result.path))
            if not isinstance(url, str):
                raise ValueError(f"the answer has no address at {result.path!r}")
        saved = self._service.transport.download(
            url, self._target, headers={}, send_key=result.send_key, max_bytes=self._service.max_bytes
        )
        if isinstance(saved, Answer):
            self._service.sleep(saved.retry_after_s or 0.0)
            raise LostError(f"HTTP {saved.status}")
        return saved[1]
