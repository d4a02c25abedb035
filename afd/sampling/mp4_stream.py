"""An mp4 that can be watched while it is being written."""

from __future__ import annotations

import os
import secrets
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import av
import numpy as np
from av.container import OutputContainer

from afd.data.video import to_pictures


class LiveVideoWriter:
    """Writes frames as they come: at any time the file is a valid video of all frames but the newest.

    While open it is a fragmented mp4, one fragment a frame, without B-frames; what a crash leaves behind still plays.
    `close` turns it into an ordinary mp4 with its index in front, without encoding again. Memory does not grow.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        fps: float,
        scale: int = 1,
        crf: int = 18,
        upscale: Literal["nearest", "bicubic"] = "nearest",
    ) -> None:
        """Remember the format; the file appears with the first frames.

        Args:
            path: replaced if it exists.
            fps: frames per second; > 0.
            scale, upscale: enlarge tiny videos for watching.
            crf: H.264 quality, 0 (lossless) to 51.
        Raises:
            ValueError: fps is not positive.
        """
        if fps <= 0:
            raise ValueError(f"fps must be > 0, got {fps}")
        self.path = Path(path)
        self.num_frames = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        self._scale, self._crf = scale, crf
        self._upscale: Literal["nearest", "bicubic"] = upscale
        self._open: tuple[OutputContainer, av.VideoStream] | None = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames [F, H, W, 3] RGB, uint8, or floating in [0, 1] (clipped).

        Raises:
            ValueError: frames have another shape, or another size than those before.
        """
        pictures = to_pictures(frames, scale=self._scale, upscale=self._upscale)
        height, width = pictures.shape[1:3]
        container, stream = self._open = self._open or self._start(height, width)
        if (stream.height, stream.width) != (height, width):
            raise ValueError(
                f"frames must be {stream.height} x {stream.width} like those before, got {height} x {width}"
            )
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self.num_frames
            container.mux(stream.encode(frame))
            self.num_frames += 1

    def close(self) -> None:
        """Finish the file; without a frame there is none. Closing twice is allowed."""
        if self._open is None:
            return
        container, stream = self._open
        self._open = None
        container.mux(stream.encode())
        container.close()
        self._index()

    def __enter__(self) -> LiveVideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, height: int, width: int) -> tuple[OutputContainer, av.VideoStream]:
        options = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
        container = av.open(str(self.path), mode="w", format="mp4", options=options)
        stream = container.add_stream("libx264", rate=self._fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": str(self._crf), "preset": "veryfast", "tune": "zerolatency"}
        return container, stream

    def _index(self) -> None:
        """Copy the packets into an mp4 with the index in front, in the place of the fragments."""
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        with (
            av.open(str(self.path)) as source,
            av.open(str(temporary), mode="w", format="mp4", options={"movflags": "+faststart"}) as target,
        ):
            video = source.streams.video[0]
            copy = target.add_stream_from_template(video)
            for packet in source.demux(video):
                if packet.dts is not None:  # the last one only flushes
                    packet.stream = copy
                    target.mux(packet)
        os.replace(temporary, self.path)
