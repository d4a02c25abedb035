"""From a student and a sentence to a video: a finished clip, or a stream that is watched while it is made."""

from afd.sampling.clip import sample_video
from afd.sampling.mp4_stream import LiveVideoWriter
from afd.sampling.stream import StreamedChunk, StreamStatistics, stream_chunks

__all__ = ["LiveVideoWriter", "StreamStatistics", "StreamedChunk", "sample_video", "stream_chunks"]
