"""The source of a teacher that answers at once: order, what is asked, and a teacher that fails."""

import time

import pytest

from afd.teachers.base import FinishedVideo, SourceVideo, VideoRequest
from afd.teachers.physics import PhysicsTeacher
from afd.teachers.sources import GeneratedSource

PROMPT = "a small red ball is thrown to the left at high speed"
REQUESTS = tuple(VideoRequest("a ball", seed, f"video-{seed}") for seed in range(8))


class SlowAtFirst:
    """Takes longer for its first videos, so that later ones are finished before them; seed 5 cannot be made."""

    def __init__(self, *, fails: bool = False) -> None:
        self.asked: set[int] = set()
        self._fails = fails

    def generate(self, prompt: str, seed: int) -> FinishedVideo:
        self.asked.add(seed)
        time.sleep(0.03 if seed % 2 == 0 else 0.0)
        if self._fails and seed == 5:
            raise ValueError("no video of seed 5")
        return FinishedVideo(prompt, seed, f"{prompt} {seed}".encode(), f"video-{seed}")


def source(teacher: SlowAtFirst) -> GeneratedSource:
    return GeneratedSource(teacher, REQUESTS, teacher="slow", version="1")


def test_videos_come_in_the_order_of_their_requests() -> None:
    videos = list(source(SlowAtFirst()).videos())
    assert [video.source_id for video in videos] == [request.source_id for request in REQUESTS]
    assert [video.data for video in videos if isinstance(video, SourceVideo)] == [
        f"a ball {seed}".encode() for seed in range(8)
    ]


def test_only_wanted_requests_reach_the_teacher() -> None:
    teacher = SlowAtFirst()
    videos = list(source(teacher).videos(lambda request: request.seed % 3 == 0))
    assert [video.source_id for video in videos] == ["video-0", "video-3", "video-6"]
    assert teacher.asked == {0, 3, 6}


def test_failing_teacher_raises_at_its_turn() -> None:
    videos = source(SlowAtFirst(fails=True)).videos()
    assert [next(videos).source_id for _ in range(5)] == [f"video-{seed}" for seed in range(5)]
    with pytest.raises(ValueError, match="no video of seed 5"):
        next(videos)


def test_world_asked_by_several_threads_gives_the_bytes_it_gives_alone() -> None:
    world = PhysicsTeacher()
    requests = [VideoRequest(PROMPT, seed, f"video-{seed}") for seed in range(6)]
    together = list(GeneratedSource(world, requests, teacher="physics", version=world.version).videos())
    for request, video in zip(requests, together, strict=True):
        assert isinstance(video, SourceVideo)
        assert video.data == world.generate(request.prompt, request.seed).mp4
