"""What computes: which device, and getting a GPU ready while the run is planned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import torch

from loftq_cli.checkpoint.loader import GPU_THREADS, PIECE_BYTES
from loftq_cli.errors import LoftqError
from loftq_cli.kernels import fused
from loftq_cli.ranks import local_rank

_waking: threading.Thread | None = None


def resolve_device(name: str) -> torch.device:
    """`auto` → a GPU, else the CPU; under torchrun every rank of a machine takes a GPU of its own.

    Raises:
        LoftqError: a GPU is asked for that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", local_rank()) if name == "cuda" else torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} CUDA devices"
        if local_rank():
            raise LoftqError(f"process {local_rank()} of this machine has no GPU: {seen}", "start as many as GPUs")
        raise LoftqError(f"`--device {name}`: {seen}", "use `--device auto` or `cpu`")
    return device


def wake(device: torch.device, rehearse: Callable[[], None]) -> None:
    """Have a GPU get ready in the background: context, pinned memory, libraries, kernels.

    Args:
        device: on a CPU there is nothing to do.
        rehearse: does on the GPU, with little, what the run is going to do with much.
    """
    global _waking
    if device.type == "cuda" and _waking is None:
        _waking = threading.Thread(target=_get_ready, args=(device, rehearse), daemon=True)
        _waking.start()


def is_waking() -> bool:
    """Whether `wake` has started a GPU in this process."""
    return _waking is not None


def wait_until_ready(device: torch.device) -> None:
    """Wait for `wake`, or do what must be done before several threads use the GPU."""
    if device.type != "cuda":
        return
    if _waking is not None:
        _waking.join()
    try:
        _load_libraries(device)
        fused()  # tried out by one thread, not by all that compute
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice: torch's own error, or CUDA's and its libraries', known by their words."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _get_ready(device: torch.device, rehearse: Callable[[], None]) -> None:
    with suppress(Exception):  # where something is wrong, the run itself will meet it and say so
        torch.cuda.set_device(device)
        beside = threading.Thread(target=_prepare_memory, args=(device,), daemon=True)
        beside.start()
        fused()  # mostly Python's work, the other is not
        beside.join()
        rehearse()


def _prepare_memory(device: torch.device) -> None:
    """Have torch take, and keep, pinned memory for what is read, and load its libraries."""
    with suppress(Exception):
        torch.cuda.set_device(device)
        kept = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2 * GPU_THREADS)]
        del kept
        _load_libraries(device)


def _load_libraries(device: torch.device) -> None:
    """Have torch load its linear algebra, which it cannot do in two threads at a time."""
    with torch.cuda.device(device):
        eye = torch.eye(32, dtype=torch.float64, device=device).repeat(2, 1, 1)
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(eye).L, eye, upper=False)
        torch.linalg.eigh(eye)
        for dtype in (torch.float32, torch.bfloat16):
            torch.bmm(eye.to(dtype), eye.to(dtype))
