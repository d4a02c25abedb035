"""What is prepared and where: the source, its split, the settings, and which folders may be replaced."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from afd.config import RunConfig
from afd.data.schema import Reject, settings_fingerprint
from afd.data.writer import is_vacant, prepared_from, quote_rejects, require_replaceable, shards_match
from afd.preparation import Overwrite, shard_folders
from afd.preparation.intake import SPLITS, Census, SplitRule, hash_split, take_census
from afd.preparation.journal import Journal, encoded_teachers
from afd.preparation.published import Published
from afd.teachers.base import VideoRequest, VideoSource
from afd.teachers.physics import PhysicsTeacher, heldout_prompts, training_prompts
from afd.teachers.sources import GeneratedSource, open_source

BUILT_IN = "physics"

logger = logging.getLogger(__name__)


def open_split_source(config: RunConfig) -> tuple[VideoSource, SplitRule | None]:
    """The configured source of videos, and its own split where it has one."""
    if config.teacher.kind != "physics":
        return open_source(config), None
    teacher = PhysicsTeacher(config.teacher.physics)
    train = training_prompts(config.teacher.num_prompts)
    heldout = heldout_prompts(config.teacher.num_heldout_prompts)
    each = config.teacher.videos_per_prompt
    asked = [(prompt, each * number + again) for number, prompt in enumerate(train) for again in range(each)]
    asked += [(prompt, number) for number, prompt in enumerate(heldout)]
    requests = [VideoRequest(prompt, seed, teacher.source_id(prompt, seed)) for prompt, seed in asked]
    source = GeneratedSource(teacher, requests, teacher="physics", version=teacher.version)
    held = frozenset(heldout)
    return source, lambda request: "heldout" if request.prompt in held else "train"


def _hash_split(config: RunConfig, census: Census) -> SplitRule:
    if census.num_prompts < 2:
        raise ValueError(
            f"the teacher must offer at least 2 different prompts, one to train on and one to hold out, "
            f"got {census.num_prompts} in {census.num_requests} requests "
            f"({quote_rejects(census.rejects, census.num_rejects)})"
        )
    return hash_split(config.prepare.heldout_fraction, census)


def make_plan(config: RunConfig, source: VideoSource, split_of: SplitRule | None) -> Plan:
    """Take the census of a source; without a split of its own, prompts are held out by their hash.

    Raises:
        ValueError: it offers fewer than two prompts, or a split's folder is, or lies in, the other's.
    """
    outs: dict[str, Path] = dict(zip(SPLITS, shard_folders(config), strict=True))
    train, heldout = (out.resolve() for out in outs.values())
    if train.is_relative_to(heldout) or heldout.is_relative_to(train):
        raise ValueError(
            f"data.train_shards and data.heldout_shards must be two folders, neither in the other, got {train} and "
            f"{heldout}"
        )
    census = take_census(source)
    settings = {split: _settings(config, source, census, split) for split in SPLITS}
    return Plan(config, source, split_of or _hash_split(config, census), census, settings, outs)


def _settings(config: RunConfig, source: VideoSource, census: Census, split: str) -> dict[str, object]:
    """Everything that decides the content of a split's shards; equal settings mean equal shards."""
    how = {"device", "workers", "video_timeout_s", "max_video_mib"}
    return {
        "split": split,
        "teacher": {"kind": config.teacher.kind, "name": source.teacher, "version": source.version},
        "requests": census.digest,
        "video": config.video.model_dump(mode="json"),
        "encoders": config.encoders.model_dump(mode="json"),
        "prepare": config.prepare.model_dump(mode="json", exclude=how),
    }


@dataclass(frozen=True)
class Plan:
    """What is prepared, and where: shards grow in hidden folders beside the ones they become."""

    config: RunConfig
    source: VideoSource
    split_of: SplitRule
    census: Census
    settings: dict[str, dict[str, object]]
    outs: dict[str, Path]
    base: Published = field(default_factory=Published)

    def is_published(self, split: str) -> bool:
        return shards_match(self.outs[split], settings_fingerprint(self.settings[split]))

    def staging(self, split: str) -> Path:
        out = Path(os.path.abspath(self.outs[split]))
        return out.with_name(f".{out.name}.{'more' if self.base.digest else 'partial'}")

    @property
    def work_folder(self) -> Path:
        out = Path(os.path.abspath(self.outs["train"]))
        return out.with_name(f".{out.name}.{'more.work' if self.base.digest else 'work'}")

    @property
    def fingerprint(self) -> str:
        return settings_fingerprint({**self.settings, "base": self.base.digest} if self.base.digest else self.settings)

    def open_journal(self) -> Journal:
        return Journal(self.work_folder, self.fingerprint, SPLITS)

    def explain_empty(self, split: str, rejects: Iterator[Reject]) -> str:
        """An error's text for a split of which nothing could be used: what was lost, what is kept, what to change."""
        prompts: dict[str, str] = {}

        def note(request: VideoRequest) -> bool:
            if self.split_of(request) == split:
                prompts[request.source_id] = request.prompt
            return False

        for _ in self.source.videos(note):
            pass
        lost = [reject for reject in rejects if reject.source_id in prompts]
        names = [repr(prompt[:60]) for prompt in dict.fromkeys(prompts.values())]
        return (
            f"no sample to write to {self.outs[split]}: the prompts of this split ({', '.join(names[:3])}"
            f"{f', {len(names) - 3} more' if len(names) > 3 else ''}) gave none "
            f"({quote_rejects(lost, len(lost))}). What was encoded stays in {self.work_folder}: mend these videos and "
            "give the same command, which asks again for what was rejected; or start over with another "
            f"prepare.heldout_fraction than {self.config.prepare.heldout_fraction:g} and --overwrite"
        )

    def tidy_up(self) -> None:
        """Drop the work folder of a preparation that was killed after its shards were in place."""
        if self.work_folder.exists():
            journal = self.open_journal()
            journal.discard()
            journal.close()

    def make_room(self, todo: list[str], overwrite: Overwrite) -> None:
        """Drop an unfinished preparation with other settings, and see that the splits' folders may be replaced.

        Raises:
            ValueError: one may not; says what it holds and what to do. Nothing was dropped then.
        """
        for split in todo:
            out = self.outs[split]
            require_replaceable(out)
            kind = prepared_from(out)
            if not is_vacant(out) and not self._may_replace(out, {kind}, overwrite):
                raise ValueError(
                    f"{out} exists already, {f'prepared from teacher.kind={kind}' if kind else 'made'} with other "
                    "settings: train on it with teacher.kind=shards, choose another output_dir, or replace it with "
                    "`afd prepare --overwrite`"
                )
        if self._may_replace(self.work_folder, encoded_teachers(self.work_folder), overwrite):
            self.discard_foreign_work()

    def _may_replace(self, folder: Path, teachers: set[str], overwrite: Overwrite) -> bool:
        """Whether a folder may go; "built_in" allows it where the built-in world made it, in `output_dir/data`."""
        if overwrite != "built_in":
            return overwrite
        data = self.config.output_dir / "data"
        return teachers <= {BUILT_IN} and os.path.abspath(folder.parent) == os.path.abspath(data)

    def discard_foreign_work(self) -> None:
        """Drop an unfinished preparation with other settings."""
        try:
            self.open_journal().close()
        except ValueError as error:
            if "other settings" not in str(error):
                raise
            logger.warning("dropping the unfinished preparation in %s", self.work_folder)
            self.discard_work()

    def discard_work(self) -> None:
        for folder in (self.work_folder, *(self.staging(split) for split in SPLITS)):
            shutil.rmtree(folder, ignore_errors=True)
