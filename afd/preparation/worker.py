"""A decoding process: pickled (SourceVideo, ClipFormat) in on stdin, pickled `Clip` or reason out on stdout.

Anything FFmpeg does to this process ends this process only; pool.py starts another. It ends with its stdin.
"""

from __future__ import annotations

import os
import pickle
import sys

import av.logging
import cv2

from afd.preparation.decoding import decode_clip
from afd.stopping import ignore_stop_signals


def main() -> None:
    """Serve jobs until stdin ends. Signals that ask the whole job to stop are not for this process: its death would
    read as the video's fault."""
    ignore_stop_signals()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    av.logging.set_level(av.logging.PANIC)
    cv2.setNumThreads(1)
    jobs = sys.stdin.buffer
    while True:
        try:
            video, wanted = pickle.load(jobs)
        except EOFError:
            return
        pickle.dump(decode_clip(video, wanted), answers, protocol=5)
        answers.flush()


if __name__ == "__main__":
    main()
