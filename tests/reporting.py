"""A rank that does nothing but report to the others: what test_failure.py starts to try the watchdog alone."""

import os
import sys
import time
from pathlib import Path

from diffusion.distributed.watchdog import Watchdog, connect

SIZE = 3


def reporting(rank: int, does: str, port: int, output: Path) -> None:
    """As this rank `works`, `dies`, `ends`, `raises`, `waits` or `hangs`. All of them begin together."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = connect(60.0)
    if store.add("here", 1) == SIZE:
        store.set("all here", "yes")
    store.wait(["all here"])
    last_words = lambda: print("last words", rank, flush=True)  # noqa: E731
    dog = Watchdog(rank, SIZE, connect(), silence=4, timeout=6, last_words=last_words)
    dog.start()
    for step in range(1, 1000):
        if does == "hangs" and step > 5:
            time.sleep(1000)
        if does == "raises" and step == 5:
            print("cause:", dog.failed(ValueError("no more"))[0], flush=True)
            os._exit(1)
        if does == "ends" and step == 20 + 10 * rank:
            break
        if does != "waits":
            dog.step(step)
        time.sleep(0.1)
    dog.stop()
    print("over", rank, flush=True)
    os._exit(0)
