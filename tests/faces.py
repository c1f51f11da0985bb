"""Async clients and transports with the methods of the sync ones, so that tests run over both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from triton_sam import AsyncSAM2TritonClient, SAM2TritonClient

FACES = ("sync", "async")


class Blocking:
    """An async object whose coroutines are run to their end, in an event loop of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._inner = make()
        except BaseException:
            self._loop.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self.run(self._inner.close())
        self.run(asyncio.sleep(0))
        assert asyncio.all_tasks(self._loop) == set()
        self.run(self._loop.shutdown_default_executor())

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(value):
            return value
        return lambda *args, **kwargs: self.run(value(*args, **kwargs))

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.close()


class AsyncFace:
    """A sync object whose methods are coroutines."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        async def method(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return getattr(self._inner, name)(*args, **kwargs)

        return method


def open_client(face: str, url: str, **arguments: Any) -> Any:
    """A client at ``url`` with the methods of the sync one."""
    if face == "sync":
        return SAM2TritonClient(url, **arguments)
    return Blocking(lambda: AsyncSAM2TritonClient(url, **arguments))
