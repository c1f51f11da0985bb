"""Who is measured: the client on a server, and how a connection to it is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..background import BackgroundSAM2Client
from ..client import SAM2TritonClient
from ..core import Where
from ..images import ImageSource
from ..specs import Family, family
from ..transport import Endpoint, Transport, TransportOptions, open_transport
from .server_stats import Watch
from .timed import TimedTransport

Role = Literal["subject", "reference"]
OPTIONS = TransportOptions(timeout_s=120.0)
_MAX_PIXELS = 100_000_000


class Segmenter(Protocol):
    """The part of the client that is measured; the references have it too."""

    def set_image(self, image: ImageSource) -> None: ...

    def predict(self, point_coords: Any, point_labels: Any) -> Any: ...

    def segment(self, point_coords: Any, point_labels: Any) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Subject:
    """One way to have an image segmented.

    ``transport``: notes the calls, where there are any. ``watch``: the server's counters.
    ``url``: the server's address. ``full_size_only``: it gives masks at the image's size and no
    others, so that only such workloads compare. ``which``: what it asks for, and where it keeps
    embeddings.
    """

    name: str
    role: Role
    segmenter: Segmenter
    transport: TimedTransport | None = None
    watch: Watch | None = None
    url: str | None = None
    full_size_only: bool = False
    which: Which | None = None

    @property
    def client(self) -> SAM2TritonClient:
        """The segmenter of all that are not ``full_size_only``."""
        assert isinstance(self.segmenter, SAM2TritonClient)
        return self.segmenter

    @property
    def keeps_embeddings(self) -> bool:
        """Whether its embeddings lie where its own client alone can use them."""
        return self.which is not None and self.which.embedding != "client"

    @property
    def in_process(self) -> bool:
        """Whether it runs its models itself."""
        return self.url is None

    def call_s(self) -> float | None:
        """Mean seconds of a call of its models since :meth:`start`; ``None`` on a server."""
        calls = [] if self.transport is None else self.transport.take()
        if not calls or not self.in_process:
            return None
        return sum(call.seconds for call in calls) / len(calls)

    def stages(self) -> dict[str, float]:
        """Seconds since :meth:`start`: in the transport, and on the server by its counters.

        The counters are left out where they are not of these calls alone: another client asked
        meanwhile, or the server has not counted ours yet.
        """
        if self.transport is None:
            return {}
        calls = self.transport.take()
        seconds = sum(call.seconds for call in calls)
        if self.in_process:
            return {"transport": seconds, "compute": seconds}
        found = {"transport": seconds}
        if self.watch is not None:
            added = self.watch.stop(len(calls))
            if added.requests == len(calls):
                found |= added.seconds()
        return found

    def start(self) -> None:
        """Forget what was seen so far."""
        if self.transport is not None:
            self.transport.take()
        if self.watch is not None:
            self.watch.start()


@dataclass(frozen=True)
class Which:
    """The models that are asked: a family, and one of its variants or the default.

    ``embedding``: where embeddings are kept, as the client's argument of that name.
    """

    model_type: str
    variant: str | None = None
    embedding: Where = "client"

    @property
    def family(self) -> Family:
        """The entry of the table, with the models' names on the server."""
        return family(self.model_type).named(self.variant)


@contextmanager
def served(
    url: str, which: Which, watch: Watch | None = None, role: Role = "subject"
) -> Iterator[Subject]:
    """The client on the server at ``url``."""
    segmenter, transport = open_client(which, open_transport(url, OPTIONS))
    with segmenter:
        # The predictor answers later than Triton believes it computes: its split would be wrong.
        seen = None if which.embedding == "server" else watch
        name = served_name(url, which)
        yield Subject(name, role, segmenter, transport, seen, url, which=which)


def served_name(url: str, which: Which) -> str:
    """How the client on ``url`` is called in tables: by protocol and way of the embedding."""
    protocol = "gRPC" if Endpoint.parse(url).grpc else "HTTP"
    places = {"server": "on the server", "shared-memory": "in shared memory"}
    return f"client, {protocol}, embedding {places.get(which.embedding, 'inline')}"


def open_client(which: Which, transport: Transport) -> tuple[SAM2TritonClient, TimedTransport]:
    """A client over ``transport``, and what notes its calls.

    With :func:`open_background` the only place that makes clients to be measured.
    """
    timed = TimedTransport(transport)
    client = SAM2TritonClient(
        model_type=which.model_type,
        variant=which.variant,
        max_image_pixels=_MAX_PIXELS,
        embedding=which.embedding,
        transport=timed,
    )
    return client, timed


def open_background(url: str, which: Which) -> BackgroundSAM2Client:
    """The client with the hover, in a thread of its own."""
    return BackgroundSAM2Client(
        url,
        which.model_type,
        variant=which.variant,
        options=OPTIONS,
        max_image_pixels=_MAX_PIXELS,
        embedding=which.embedding,
    )


def typical(values: Mapping[str, float]) -> dict[str, float]:
    """The stages of one operation that add up to its ``total``, in seconds.

    ``values``: ``total``, and what :meth:`Subject.stages` found. What is not known is left out.
    """
    total = values["total"]
    if "transport" not in values:
        return {"in process": total}
    client = max(total - values["transport"], 0.0)
    if "compute" not in values:
        return {"client": client, "wire and server": values["transport"]}
    if "request" not in values:
        return {"client": client, "compute": values["compute"]}
    parts = {name: values[name] for name in ("queue", "input", "compute", "output")}
    return {
        "client": client,
        "wire": max(values["transport"] - values["request"], 0.0),
        **parts,
        "server, other": max(values["request"] - sum(parts.values()), 0.0),
    }
