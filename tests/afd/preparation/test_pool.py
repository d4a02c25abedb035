"""Decoding processes: results in order, a process that hangs or dies costs its own video only."""

from collections.abc import Callable
from typing import Any

import pytest

from afd.preparation import pool as pool_module
from afd.preparation.decoding import Clip, ClipFormat
from afd.preparation.pool import DecoderPool
from afd.teachers.base import SourceVideo

WANTED = ClipFormat(num_frames=12, height=16, width=16, fps=8)


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_costs_one_video(
    video: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [SourceVideo("p", i, f"s{i}", "t", "1", data=video(i)) for i in range(8)]
    plain = pool_module._Process.ask

    def ask(self: Any, job: Any, timeout_s: float) -> Any:
        if job[0].source_id == "s2":
            self._process.kill()
        return plain(self, job, 0.0 if job[0].source_id == "s5" else timeout_s)

    monkeypatch.setattr(pool_module._Process, "ask", ask)
    pool = DecoderPool(WANTED, num_workers=2, timeout_s=60)
    jobs = [videos[0], None, *videos[1:]]
    results = list(pool.map(jobs, lambda job: job))
    assert [job for job, _ in results] == jobs
    by_name = {job.source_id: result for job, result in results if job is not None}
    assert by_name["s2"] == "the decoder died (signal 9)"
    assert by_name["s5"] == "decoding took longer than 60 s"
    assert all(isinstance(by_name[f"s{i}"], Clip) for i in (0, 1, 3, 4, 6, 7))


@pytest.mark.slow
@pytest.mark.parametrize(("waiting_bytes", "expected"), [(1 << 30, 4), (1, 1)])
def test_decoded_clips_do_not_pile_up_before_a_slow_encoder(
    video: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, waiting_bytes: int, expected: int
) -> None:
    monkeypatch.setattr(pool_module, "_WAITING_BYTES", waiting_bytes)
    videos = [SourceVideo("p", i, f"s{i}", "t", "1", data=video(i)) for i in range(8)]
    num_begun, most = 0, 0

    def begin(job: SourceVideo) -> SourceVideo:
        nonlocal num_begun
        num_begun += 1
        return job

    for number, _ in enumerate(DecoderPool(WANTED, num_workers=2, timeout_s=60).map(videos, begin)):
        most = max(most, num_begun - number - 1)
    assert most == expected
