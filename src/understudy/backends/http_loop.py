"""The background thread whose event loop serves every client of the process."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading

_lock = threading.Lock()
_running: dict[int, asyncio.AbstractEventLoop] = {}  # by process id: a fork has none


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process's background thread, which is started where there is none."""
    with _lock:
        if os.getpid() not in _running:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="understudy-http", daemon=True)
            thread.start()
            atexit.register(_stop, os.getpid(), loop, thread)
            _running[os.getpid()] = loop
        return _running[os.getpid()]


def _stop(pid: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End the thread when the process ends. Not in a fork: its copy of the loop shares files with the parent's."""
    if pid == os.getpid():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(timeout=5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
