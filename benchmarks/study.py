"""The paper's comparison, its ablations and a regime map, re-run on the built-in world.

    python benchmarks/study.py --preset quick                      # minutes on two cores
    python benchmarks/study.py --preset paper --dry_run            # what it would run, and how long that takes
    python benchmarks/study.py --preset paper --only main,ablations --families chunk_wise
    python benchmarks/study.py --preset paper --match '*/chunk_wise/*/terminal_only/*'

Each row is one real run of `launch/train.py` and one measurement on the held-out prompts; rows are appended to
`<out>/rows.csv` one at a time, and the same command goes on where it was stopped. Tables, plots, contact sheets and
`study.html` are written at the end from the finished rows. docs/study.md says how to read them.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:0] = [str(ROOT), str(ROOT / "kernels")]

from study_rows import FAMILIES, METHODS, PACE, PRESETS, TABLES, WORLDS, Row, build_rows, search_rows  # noqa: E402 (the path first)
from study_runs import (  # noqa: E402
    Choice,
    Interrupted,
    Plan,
    Study,
    as_cells,
    commit_name,
    describe_device,
    look,
    measure,
    resolve,
    train,
)
from study_scores import METRICS, TOTALS, preference  # noqa: E402
from study_tables import append_rows, read_rows, write_tables  # noqa: E402
from study_time import PASS_S, Clock, pass_seconds  # noqa: E402

from afd.commands.options import positive_int  # noqa: E402 (the path first)

_INTERRUPTED = 130
Job = Callable[[int | None], None]


def main() -> int:
    """Run what is not done yet; returns 0, 1 if a row failed, 2 if no row was meant, or 130 if it was stopped."""
    arguments = _parse()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    preset = PRESETS[arguments.preset]
    if arguments.searched:
        preset = replace(preset, searched=arguments.searched)
    study = Study(preset, arguments.out.resolve())
    rows = [
        row
        for row in build_rows(preset, arguments.only, arguments.families)
        if any(fnmatchcase(row.id, pattern) for pattern in arguments.match)
    ]
    if not rows:
        sys.stderr.write(
            f"error: --match must fit the id of a row (--dry_run shows them), got {' '.join(arguments.match)}\n"
        )
        return 2
    searches = search_rows(preset, rows)
    devices = _devices(arguments.jobs)
    slowness = pass_seconds("cpu" if devices[0] is None else "cuda") / PASS_S
    runner = Runner(study, devices=devices, clock=Clock(preset, slowness=slowness))
    runner.announce(searches, rows, in_full=arguments.dry_run)
    if arguments.dry_run:
        return 0
    study.out.mkdir(parents=True, exist_ok=True)
    _load_shared_modules()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: study.stop_children())
    try:
        runner.search(searches)
        runner.run(rows)
    except Interrupted:
        print(f"stopped; the same command goes on from {study.out / 'rows.csv'}", flush=True)
        return _INTERRUPTED
    from study_page import write_page

    print(write_tables(study.out, study.preset, study.choices))
    print(f"\n{write_page(study.out, study.preset, study.choices)}")
    for problem in runner.problems:
        print(f"failed: {problem}")
    return 1 if runner.problems else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--only", type=_names_of(TABLES), default=TABLES, help=f"tables, of {','.join(TABLES)}")
    every = tuple(FAMILIES)
    parser.add_argument("--families", type=_names_of(every), default=every, help=f"students, of {','.join(every)}")
    parser.add_argument(
        "--match", nargs="+", default=["*"], help="ids of the rows wanted, as shell patterns: '*/frozen_D/*' 'main/*'"
    )
    parser.add_argument(
        "--searched", type=_names_of(every),
        help="families with their own search, else the first family's (default: the preset's)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write (default: outputs/study_<preset>)")
    parser.add_argument("--jobs", type=positive_int, help="runs at a time without GPUs (default: 2, or 1 on one core)")
    parser.add_argument("--dry_run", action="store_true", help="print the rows and the time they take, and stop")
    arguments = parser.parse_args()
    arguments.out = arguments.out or ROOT / "outputs" / f"study_{arguments.preset}"
    return arguments


def _names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        return names

    return parse


def _load_shared_modules() -> None:
    """Load what rows need in this process before there are threads: two that import a lazy package at once can find
    half of it (`cannot import name 'AutoTokenizer'`)."""
    import transformers

    for name in ("AutoTokenizer", "UMT5EncoderModel"):
        getattr(transformers, name)


def _devices(jobs: int | None) -> list[int | None]:
    """One place per run at a time: every GPU, or `jobs` places on the CPU."""
    if torch.cuda.is_available() and jobs is None:
        return list(range(torch.cuda.device_count()))
    return [None] * (jobs or min(2, len(os.sched_getaffinity(0))))


class Runner:
    """Works rows off on the devices, one file of rows for the search and one for the study."""

    def __init__(self, study: Study, *, devices: Sequence[int | None], clock: Clock) -> None:
        self.study, self.devices, self.clock = study, devices, clock
        self.problems: list[str] = []
        self._commit = commit_name()

    def announce(self, searches: list[Row], rows: list[Row], *, in_full: bool) -> None:
        """Print what is left to do and how long that takes; in full, what each row runs."""
        self.choose(searches)
        left = self.left(searches, self.study.out / "search.csv"), self.left(rows, self.study.out / "rows.csv")
        print(f"{len(searches) + len(rows) - sum(map(len, left))} rows are there already")
        print(self.clock.describe(*left, len(self.devices)), flush=True)
        for row in (*left[0], *left[1]) if in_full else ():
            plan = self._plan(row)
            print(f"{row.id}: {' '.join([*plan.sampling, *plan.training]) or 'measured only'}")

    def search(self, rows: list[Row]) -> None:
        """Try every learning rate, look at every share of the steps and every average, and choose for each family and
        method."""
        self._work(rows, self.study.out / "search.csv", self._search_row, label="search")
        self.choose(rows)
        for (family, method), choice in sorted(self.study.choices.items()):
            what = f"learning rate {choice.learning_rate:g}, {choice.updates} updates, average {choice.average}"
            print(f"chosen for {family} {method}: {what}")

    def choose(self, rows: list[Row]) -> None:
        """Take the best look of each family and method from what the search has written so far."""
        best: dict[tuple[str, str], tuple[float, Choice]] = {}
        wanted = {(row.id, self._plan(row).settings) for row in rows}
        for record in read_rows(self.study.out / "search.csv"):
            key = (record["family"], record["method"])
            if (record["id"], record["settings"]) not in wanted or not record["preference"]:
                continue
            score = float(record["preference"])
            if key not in best or score > best[key][0]:
                updates = int(record["step"]) // PACE[record["method"]]
                best[key] = (score, Choice(float(record["learning_rate"]), updates, record["average"]))
        self.study.choices = {key: choice for key, (_, choice) in best.items()}

    def run(self, rows: list[Row]) -> None:
        """All rows; those that go on from another one's student come last."""
        for label, go_on in (("rows", False), ("rows that go on from others", True)):
            chosen = [row for row in rows if (row.after is not None) is go_on]
            self._work(chosen, self.study.out / "rows.csv", self._study_row, label=label)

    def left(self, rows: Sequence[Row], path: Path) -> list[Row]:
        """The rows that `path` does not hold."""
        done = {(record["id"], record["settings"]) for record in read_rows(path)}
        return [row for row in rows if (row.id, self._plan(row).settings) not in done]

    def _plan(self, row: Row) -> Plan:
        return resolve(self.study, row, WORLDS[row.world])

    def _work(self, rows: list[Row], path: Path, one: Callable[..., None], *, label: str) -> None:
        """Run the rows that `path` does not hold, on all devices, and say after each how long the rest takes."""
        left = self.left(rows, path)
        if len(left) < len(rows):
            print(f"{label}: {len(rows) - len(left)} of {len(rows)} rows are there already")
        places: queue.Queue[int | None] = queue.Queue()
        for device in self.devices:
            places.put(device)

        def job(row: Row) -> None:
            gpu = places.get()
            try:
                if not self.study.stop.is_set():
                    one(row, path, gpu)
            finally:
                places.put(gpu)

        with ThreadPoolExecutor(len(self.devices)) as pool:
            pending = {pool.submit(job, row): row for row in left}
            while pending:
                self._collect(pending)
        if self.study.stop.is_set():
            raise Interrupted

    def _collect(self, pending: dict[Future[None], Row]) -> None:
        finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in finished:
            row = pending.pop(future)
            error = future.exception()
            if isinstance(error, RuntimeError | ValueError | OSError):
                self.problems.append(f"{row.id}: {error}")
                print(f"failed: {row.id}: {error}", flush=True)
            elif error is not None and not isinstance(error, Interrupted):
                self.study.stop_children()
                raise error
            elif error is None and not self.study.stop.is_set():
                left = self.clock.left(list(pending.values()), len(self.devices))
                print(f"{row.id} is done; {len(pending)} rows left, about {left}", flush=True)

    def _search_row(self, row: Row, path: Path, gpu: int | None) -> None:
        plan = self._plan(row)
        folder, seconds = train(self.study, row, plan, gpu=gpu)
        assert plan.choice is not None
        self.clock.note(row, plan.choice.updates, seconds)
        records = [
            {
                **_identity(row, plan), "learning_rate": plan.choice.learning_rate, "step": step, "average": average,
                "preference": f"{preference(result):.6g}", **as_cells(result, TOTALS),
            }
            for step, average, result in look(self.study, row, plan, folder, gpu=gpu)
        ]  # fmt: skip
        append_rows(path, records)

    def _study_row(self, row: Row, path: Path, gpu: int | None) -> None:
        plan, started = self._plan(row), time.perf_counter()
        folder, seconds = train(self.study, row, plan, gpu=gpu) if row.method in METHODS else (None, 0.0)
        values = measure(self.study, row, plan, folder, gpu=gpu)
        if plan.choice is not None:
            self.clock.note(row, plan.choice.updates, seconds)
        trained = {"learning_rate": "", "updates": 0, "average": ""} if plan.choice is None else asdict(plan.choice)
        record: dict[str, Any] = {
            **_identity(row, plan), **trained, "train_s": round(seconds, 1),
            "total_s": round(time.perf_counter() - started, 1), "commit": self._commit, "device": describe_device(gpu),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), **as_cells(values, METRICS),
        }  # fmt: skip
        teacher = {"world": row.world, **as_cells(self.study.teacher_values(row.world), METRICS)}
        append_rows(self.study.out / "teachers.csv", [teacher], unique="world")
        append_rows(path, [record])


def _identity(row: Row, plan: Plan) -> dict[str, Any]:
    names = ("id", "table", "family", "method", "label", "world", "cell", "seed")
    return {**{name: getattr(row, name) for name in names}, "settings": plan.settings}


if __name__ == "__main__":
    sys.exit(main())
