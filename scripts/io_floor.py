"""The time that moving the bytes alone takes: a model read to the device while as many bytes as OUT has are written.

    python scripts/io_floor.py MODEL SCRATCH --write 1000000 2000000 [--threads 8]

Reader threads copy every byte of MODEL's safetensors files through pinned buffers to the device (on a CPU they only
read); two writer threads write one file for each number of bytes in `--write` from a ready buffer, and flush each to
the disk. SCRATCH is made, and left for the caller to remove: that is not a part of the time. Prints one JSON object;
the floor to compare a process with is the wall time of this whole process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

CHUNK = 16 << 20
WRITERS = 2  # one file is written while another is flushed


def read_all(files: list[Path], threads: int, device: Any) -> None:
    """Every byte once, in chunks, by several threads."""
    import torch

    chunks: SimpleQueue[tuple[int, int, int]] = SimpleQueue()
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        for offset in range(0, size, CHUNK):
            chunks.put((descriptor, offset, min(CHUNK, size - offset)))
    on_gpu = device.type == "cuda"

    def work() -> None:
        # two buffers: one is filled while the other is copied
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(1 + on_gpu)]
        scratch = torch.empty(CHUNK, dtype=torch.uint8, device=device) if on_gpu else None
        stream = torch.cuda.Stream(device) if on_gpu else None
        copied = [torch.cuda.Event() for _ in buffers] if on_gpu else []
        turn = 0
        while True:
            try:
                descriptor, offset, count = chunks.get_nowait()
            except Empty:
                break
            turn = (turn + 1) % len(buffers)
            if on_gpu:
                copied[turn].synchronize()
            view, done = buffers[turn].numpy().data, 0
            while done < count:
                got = os.preadv(descriptor, [view[done:count]], offset + done)
                if not got:
                    raise OSError("a file became shorter while it was read")
                done += got
            if scratch is not None:
                with torch.cuda.stream(stream):
                    scratch[:count].copy_(buffers[turn][:count], non_blocking=True)
                    copied[turn].record()
        if stream is not None:
            stream.synchronize()

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    for descriptor in descriptors:
        os.close(descriptor)


def write_all(folder: Path, sizes: list[int]) -> None:
    folder.mkdir(parents=True)
    buffer = memoryview(os.urandom(CHUNK))  # zeros might cost the disk less

    def write(numbered: tuple[int, int]) -> None:
        number, left = numbered
        descriptor = os.open(folder / str(number), os.O_CREAT | os.O_WRONLY, 0o644)
        while left:
            left -= os.write(descriptor, buffer[: min(CHUNK, left)])
        os.fsync(descriptor)
        os.close(descriptor)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, enumerate(sizes)))


def timed_thread(work: Callable[[], object], seconds: list[float], failures: list[BaseException]) -> threading.Thread:
    def run() -> None:
        start = time.perf_counter()
        try:
            work()
        except BaseException as error:
            failures.append(error)
        seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def main(model: Path, scratch: Path, write: list[int], threads: int, device: str | None) -> None:
    started = time.perf_counter()
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda":
        torch.zeros(1, device=where)
        torch.cuda.synchronize(where)
    start = time.perf_counter()
    files = sorted(model.glob("*.safetensors"))
    read_seconds: list[float] = []
    write_seconds: list[float] = []
    failures: list[BaseException] = []
    writing = timed_thread(lambda: write_all(scratch, write), write_seconds, failures)
    reading = timed_thread(lambda: read_all(files, threads, where), read_seconds, failures)
    reading.join()
    writing.join()
    if failures:
        raise failures[0]
    print(json.dumps({
        "seconds": time.perf_counter() - started, "start_seconds": start - started, "read_seconds": read_seconds[0],
        "write_seconds": write_seconds[0], "read_bytes": sum(file.stat().st_size for file in files),
        "write_bytes": sum(write), "threads": threads, "device": str(where),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--write", type=int, nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--device")
    main(**vars(parser.parse_args()))
