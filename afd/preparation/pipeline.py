"""A source of finished videos to two folders of shards: the loop around decoding, encoding and writing.

Requests are taken in blocks of `prepare.batch_size` by their number. A block is decoded in parallel, encoded as one
batch, and noted row by row. A preparation that was killed encodes its unfinished block again as the same batch and
skips the rows it has, so that its shards come out byte for byte as without the interruption. A later pass over the
source asks again for what it did not give for now (published.py), and appends; it survives kills in the same way.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from afd.config import RunConfig
from afd.data.mds import drop_unfinished
from afd.data.schema import Reject, Sample
from afd.data.writer import (
    NUM_LOGGED,
    REJECTS_FILE,
    ShardFolder,
    ShardSummary,
    encode_sample,
    log_rejects,
    publish,
    write_rejects,
)
from afd.models.encoders import release_memory
from afd.preparation import Overwrite
from afd.preparation.decoding import Clip
from afd.preparation.encoding import ClipEncoder
from afd.preparation.intake import SPLITS, Intake, Item, prompt_key
from afd.preparation.journal import Progress
from afd.preparation.plan import Plan, make_plan, open_split_source
from afd.preparation.pool import DecoderPool
from afd.preparation.published import Published, has_unsettled
from afd.seen import Seen
from afd.teachers.base import SourceVideo

logger = logging.getLogger(__name__)


def prepare(config: RunConfig, *, overwrite: Overwrite = False, retry: bool = False) -> dict[str, ShardSummary]:
    """See `afd.preparation.prepare_shards`."""
    plan = make_plan(config, *open_split_source(config))
    todo = [split for split in SPLITS if not plan.is_published(split)]
    if not todo:
        plan.tidy_up()
        if not has_unsettled(plan.outs["train"]):
            return {}
        if not retry:
            logger.warning("the teacher may still give some of the rejected videos: `afd prepare` asks again")
            return {}
        plan = replace(plan, base=Published(plan.outs))
        plan.discard_foreign_work()
        return _Preparation(plan, list(SPLITS)).run()
    plan.make_room(todo, overwrite)
    return _Preparation(plan, todo).run()


class _Preparation:
    """One pass over the source, from where the journal ends."""

    def __init__(self, plan: Plan, todo: list[str]) -> None:
        self._plan, self._todo = plan, todo
        self._encoder: ClipEncoder | None = None
        self._journal = plan.open_journal()
        progress, keys = self._journal.replay()
        if not self._has_shards(progress):
            logger.warning("the unfinished preparation in %s lost shards: starting again", plan.work_folder)
            self._journal.close()
            plan.discard_work()
            self._journal = plan.open_journal()
            progress, keys = self._journal.replay()
        self._videos = Seen()
        plan.base.note_samples(self._note_video)
        for source_id in self._journal.settled():
            plan.base.settle(source_id)
        for key, source_id in keys:
            self._videos.first(key, source_id)
        self._done, self._is_complete = progress.last_number, progress.is_complete
        self._num_free, self._num_rejects = progress.num_free, plan.base.num_rejects + progress.num_rejects
        self._folders = {split: self._open_folder(split, progress) for split in SPLITS}

    def run(self) -> dict[str, ShardSummary]:
        prepare, total = self._plan.config.prepare, self._plan.census.num_requests
        size = prepare.batch_size
        start = (self._done + 1) // size * size
        intake = Intake(
            self._plan.source,
            self._plan.split_of,
            start=start,
            videos_per_prompt=prepare.videos_per_prompt,
            is_settled=self._plan.base.is_settled,
        )
        bar = tqdm(total=total, initial=start, desc="teacher videos", unit="video", disable=None)
        try:
            if not self._is_complete:
                for number, results in self._blocks(intake, size):
                    self._finish_block(results, intake.refused_below(number))
                    bar.set_postfix(rejected=self._num_rejects, refresh=False)
                    bar.update(min(number, total) - bar.n)
                self._journal.add_end()
            return self._publish()
        finally:
            bar.close()
            self._videos.close()
            self._plan.base.close()
            self._journal.close()
            self._encoder = None
            release_memory()

    def _has_shards(self, progress: Progress) -> bool:
        """Whether every closed shard the journal knows is where it was put; published splits need none."""
        for split in self._todo:
            folder = self._plan.staging(split)
            entries = progress.splits[split].entries
            for entry in self._plan.base.split(split).entries + entries if entries else []:
                path = folder / entry["zip_data"]["basename"]
                if not path.is_file() or path.stat().st_size != entry["zip_data"]["bytes"]:
                    return False
        return True

    def _open_folder(self, split: str, progress: Progress) -> ShardFolder | None:
        """The split's folder with what it holds already; None when it is published."""
        if split not in self._todo:
            return None
        folder, state, base = self._plan.staging(split), progress.splits[split], self._plan.base.split(split)
        if not state.entries:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._plan.base.link(split, folder)
        drop_unfinished(folder)
        shards = ShardFolder(
            folder,
            shard_bytes=int(self._plan.config.prepare.shard_mib * 2**20),
            entries=base.entries + state.entries,
            common=base.common or state.common,
            teachers=base.teachers | state.teachers,
        )
        for row in state.rows:
            shards.add(row)
        return shards

    def _blocks(self, intake: Intake, size: int) -> Iterator[tuple[int, list[tuple[Item, Any]]]]:
        """Blocks of (item, Clip or reason or None), each with the number its requests lie below."""
        prepare = self._plan.config.prepare
        self._encoder = ClipEncoder(self._plan.config)
        default = 0 if self._plan.config.teacher.kind == "physics" else max(1, (os.cpu_count() or 2) - 1)
        workers = default if prepare.workers is None else prepare.workers
        pool = DecoderPool(self._encoder.clip_format, num_workers=workers, timeout_s=prepare.video_timeout_s)
        num_free = 0
        block: list[tuple[Item, Any]] = []
        for item, result in pool.map(intake.items(), lambda item: item.video):
            if item.number is None:
                num_free += 1
                if num_free > self._num_free:
                    self._reject(None, item.reject())
                continue
            if block and item.number // size != (block[0][0].number or 0) // size:
                yield item.number // size * size, block
                block = []
            block.append((item, result))
        yield intake.num_asked, block

    def _finish_block(self, results: list[tuple[Item, Any]], refused: list[tuple[int, Reject]]) -> None:
        """Encode what is left of a block, and note everything of it in the order of the numbers."""
        events = [_Event(number, reject) for number, reject in refused]
        batch: list[tuple[SourceVideo, Clip]] = []
        waiting: list[tuple[int, str, bytes | None]] = []
        for item, result in results:
            video, number, key = item.video, item.number or 0, None
            problem = result if isinstance(result, str) else ""
            if video is not None and isinstance(result, Clip):
                key = self._video_key(video, result.sha256)
                first = self._videos.first(key, video.source_id) if key else video.source_id
                if first == video.source_id:
                    batch.append((video, result))
                    waiting.append((number, item.split, key))
                    continue
                problem = f"the same video as {first}"
            events.append(_Event(number, item.reject(problem)))
        encoded = self._encoder.encode(batch) if batch and self._encoder is not None else []
        events += [
            _Event(number, made, split, key) for (number, split, key), made in zip(waiting, encoded, strict=True)
        ]
        for event in sorted(events, key=lambda event: event.number):
            if event.number > self._done:
                self._note(event)

    def _video_key(self, video: SourceVideo | Sample, sha256: str) -> bytes | None:
        """What must not come twice, by `prepare.dedupe_videos`."""
        policy, digest = self._plan.config.prepare.dedupe_videos, bytes.fromhex(sha256)
        return {"any": digest, "prompt": digest + prompt_key(video), "off": None}[policy]

    def _note_video(self, sample: Sample) -> None:
        key = self._video_key(sample, sample.sha256)
        if key:
            self._videos.first(key, sample.source_id)

    def _note(self, event: _Event) -> None:
        """Write a sample to its folder and the journal, or a reject to the journal."""
        made, folder = event.made, self._folders.get(event.split)
        if isinstance(made, Sample) and folder is not None:
            try:
                row = encode_sample(made)
                closed = folder.add(row)
            except ValueError as error:
                made = Reject(made.source_id, str(error))
            else:
                self._journal.add_row(event.number, event.split, row, closed, event.key)
        if isinstance(made, Reject):
            self._reject(event.number, made, event.key)

    def _reject(self, number: int | None, reject: Reject, key: bytes | None = None) -> None:
        self._num_rejects += 1
        self._journal.add_reject(number, reject, key)

    def _publish(self) -> dict[str, ShardSummary]:
        """Finish both folders, put them in place, and drop the work folder; it stays where a split is empty."""
        plan, rejects = self._plan, list(itertools.islice(self._journal.rejects(), NUM_LOGGED + 1))
        folders = {split: folder for split, folder in self._folders.items() if folder is not None}
        for split, folder in folders.items():
            if folder.num_samples == 0:
                self._journal.add_again()
                raise ValueError(plan.explain_empty(split, self._journal.rejects()))
        log_rejects(rejects, self._num_rejects - plan.base.num_rejects)
        summaries: dict[str, ShardSummary] = {}
        for split in reversed(SPLITS):  # the training folder, which holds the rejects, comes last
            if split not in folders:
                continue
            folder, count = folders[split], 0
            if split == "train":
                every = itertools.chain(plan.base.rejects(), self._journal.rejects())
                count = write_rejects(every, folder.folder / REJECTS_FILE)
            elif folder.num_samples == plan.base.split(split).num_samples:
                continue  # nothing came for it
            summary = folder.finish(plan.settings[split], num_rejects=count)
            out = Path(os.path.abspath(plan.outs[split]))
            publish(folder.folder, out)
            summaries[split] = replace(summary, path=out, rejects=tuple(rejects) if count else ())
        plan.discard_work()
        return {split: summaries[split] for split in SPLITS if split in summaries}


@dataclass(frozen=True)
class _Event:
    """What became of one request."""

    number: int
    made: Sample | Reject
    split: str = ""
    key: bytes | None = None
