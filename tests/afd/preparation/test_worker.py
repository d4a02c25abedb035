"""The decoding process when the whole job is asked to stop."""

import pickle
import signal
import subprocess
import sys

from afd.preparation.decoding import ClipFormat
from afd.teachers.base import SourceVideo


def test_signals_to_the_whole_job_do_not_end_a_decoder_and_the_end_of_its_input_does() -> None:
    job = (SourceVideo("a ball", 0, "odd", "folder", "1", data=b"no video"), ClipFormat(3, 8, 8, 8.0))
    with subprocess.Popen(
        [sys.executable, "-m", "afd.preparation.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        answers = []
        for _ in range(2):
            pickle.dump(job, worker.stdin)
            worker.stdin.flush()
            answers.append(pickle.load(worker.stdout))
            for number in (signal.SIGTERM, signal.SIGUSR2):
                worker.send_signal(number)
        assert answers[0] == answers[1]
        assert "cannot be decoded" in answers[0]
        worker.stdin.close()
        assert worker.wait(20) == 0
