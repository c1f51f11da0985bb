"""What one timed run does: encode a photo, click, or both."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial

from ..embedding import Embedding
from .subjects import Subject
from .workloads import Clicks, Photo, clicks


class Source:
    """The photo of each round as a file, made once for all that are measured with it."""

    def __init__(self, photo: Photo) -> None:
        self.photo = photo
        self._turn: int | None = None
        self._data = b""

    def file(self, turn: int) -> bytes:
        """The bytes of a JPEG file that no other round has."""
        if turn != self._turn:
            self._turn, self._data = turn, self.photo.jpeg(turn)
        return self._data

    def clicks(self, count: int, turn: int) -> Clicks:
        """``count`` prompts of one click each for round ``turn``."""
        return clicks(count, self.photo.image.size, turn)


# From another number in every run: a server that runs on still has the images of the last one.
_numbers = itertools.count(time.time_ns())


def own(file: bytes) -> bytes:
    """The same photo in a file that nobody has sent before, so that no server has it encoded.

    What follows the end of a JPEG is not looked at.
    """
    return file + next(_numbers).to_bytes(8, "big")


class Encode:
    """``set_image`` of a JPEG file: decode, resize, send, encode."""

    def __init__(self, subject: Subject, source: Source) -> None:
        self._subject = subject
        self._source = source
        self._file = b""

    def prepare(self, turn: int) -> None:
        self._file = own(self._source.file(turn))
        self._subject.start()

    def run(self) -> None:
        self._subject.segmenter.set_image(self._file)

    def finish(self) -> Mapping[str, float]:
        return self._subject.stages()


class Click:
    """One call with ``prompts`` prompts about an image that is encoded already.

    ``embedding``: gives a subject's own of the image; what takes none sets the image itself, once.
    ``full_size``: ask for masks at the size of the image and not for the low-resolution logits.
    """

    def __init__(
        self,
        subject: Subject,
        source: Source,
        embedding: Callable[[Subject], Embedding],
        prompts: int = 1,
        full_size: bool = False,
    ) -> None:
        self._subject = subject
        self._source = source
        self._prompts = prompts
        self._clicks = source.clicks(prompts, 0)
        self._call: Callable[..., object]
        if subject.full_size_only:
            subject.segmenter.set_image(source.file(0))
            self._call = subject.segmenter.segment
        else:
            call = subject.client.segment if full_size else subject.client.predict
            self._call = partial(call, embedding=embedding(subject))

    def prepare(self, turn: int) -> None:
        self._clicks = self._source.clicks(self._prompts, turn)
        self._subject.start()

    def run(self) -> None:
        self._call(self._clicks.points, self._clicks.labels)

    def finish(self) -> Mapping[str, float]:
        return self._subject.stages()


class Pipeline:
    """A photo, then ``masks`` clicks one after the other, each with its mask at image size."""

    def __init__(self, subject: Subject, source: Source, masks: int = 1) -> None:
        self._subject = subject
        self._source = source
        self._masks = masks
        self._file = b""
        self._clicks: list[Clicks] = []

    def prepare(self, turn: int) -> None:
        self._file = own(self._source.file(turn))
        self._clicks = [self._source.clicks(1, turn * self._masks + i) for i in range(self._masks)]
        self._subject.start()

    def run(self) -> None:
        self._subject.segmenter.set_image(self._file)
        for click in self._clicks:
            self._subject.segmenter.segment(click.points, click.labels)

    def finish(self) -> Mapping[str, float]:
        return self._subject.stages()
