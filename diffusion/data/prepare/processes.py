"""Distribution of work over forked processes, which end when their parent ends."""

import errno
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
Tick = Callable[[], None]
SECONDS = 0.1  # between two reports


def over_processes(
    items: Sequence[Item], work: Callable[[Item, Tick], Result], processes: int, report: Callable[[int], None]
) -> Iterator[tuple[int, Result]]:
    """Call `work(item, tick)` for every item. Yields (number of the item, result) in the order of completion.

    Worker w processes items w, w + W, ... Workers share only counters, so that a killed process leaves no lock.

    Args:
        items: the items.
        work: a function of an item and `tick`, called in a worker. It must call `tick` for each unit done, and its
            result must be small. Workers are forked, so it can use all objects of this process.
        processes: largest number of workers.
        report: called regularly with the number of units done.

    Raises:
        ValueError, OSError: a worker has raised it.
        RuntimeError: a worker has raised another error, whose traceback is in the message, or was killed. The other
            workers are stopped.
    """
    context = multiprocessing.get_context("fork")
    number = max(1, min(processes, len(items)))
    done, at = context.RawArray("q", number), context.RawArray("q", number)
    workers: list[Any] = []
    connections: dict[Connection, int] = {}
    try:
        for which in range(number if items else 0):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(os.getpid(), sender, which, number, items, work, done, at), daemon=True
            )
            worker.start()
            sender.close()
            workers.append(worker)
            connections[receiver] = which
        while connections:
            for ready in wait(list(connections), timeout=SECONDS):
                try:
                    item, kind, content = ready.recv()
                except EOFError:  # the worker has finished or died
                    which = connections.pop(ready)
                    workers[which].join()
                    if code := workers[which].exitcode:
                        by = f"signal {-code}" if code < 0 else f"status {code}"
                        raise RuntimeError(f"a worker process was ended by {by} at {items[at[which]]}") from None
                    continue
                if kind == "refused":
                    raise ValueError(content)
                if kind == "system":
                    raise OSError(*content)
                if kind == "failed":
                    raise RuntimeError(f"in a worker process:\n{content}")
                yield item, content
            report(sum(done))
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


def _work(
    parent: int, sender: Connection, which: int, number: int, items: Sequence, work: Callable, done: Any, at: Any
) -> None:
    """The main function of a worker. It ends at the next tick after its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops this one

    def tick() -> None:
        done[which] += 1
        if os.getppid() != parent:
            os._exit(1)

    for item in range(which, len(items), number):
        at[which] = item
        try:
            result = "done", work(items[item], tick)
        except OSError as error:
            result = "system", (error.errno or errno.EIO, str(error.strerror or error))
        except ValueError as error:
            result = "refused", str(error)[:10_000]
        except BaseException:
            result = "failed", traceback.format_exc()[-10_000:]
        sender.send((item, *result))
        if result[0] != "done":
            break
