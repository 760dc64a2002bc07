"""Planning in a child process, without the weight of what transformers imports on the way: for the command line alone.

`import transformers` of a decoder pulls in whatever optional package is installed (torchvision, scikit-learn, pandas),
torch's compiler and torch's distributed tensors: most of a short run. None of it shapes a model that is only built. So
in a process that is forked from ours, which ends with the plan, the packages look absent (`sys.modules[name] = None` is
Python's own way to say so), and the compiler is a module whose decorators decorate nothing; our own process gets a GPU
ready meanwhile, which two threads of one Python would do in turns. A plan that fails this way is made once more in our
own process, where nothing is hidden.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Imported by transformers or accelerate if installed, for data, metrics, training or kernels.
UNNEEDED = (
    "av", "bitsandbytes", "cv2", "decord", "deepspeed", "kernels", "librosa", "pandas", "scipy", "sklearn",
    "soundfile", "torchao", "torchaudio", "torchcodec", "torchvision",
)  # fmt: skip
COMPILER = "torch._dynamo"
PATIENCE_SECONDS = 300  # planning takes a second or two; on a slow network disk, a minute
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

_claimed, _gc_threshold = False, gc.get_threshold()


def claim_process() -> None:
    """Say that this process runs nothing but the `loftq` command: a library must not fork its host."""
    global _claimed
    _claimed = True
    # By default its threads spin so long for each other that a run beside any busy process takes five times as long;
    # alone, this costs 3 %, and not to spin at all would cost 200 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with which training repeats: see methods/training.py
    gc.set_threshold(200_000)  # imports make a million objects that stay: looking for garbage among them takes 0.7 s


def possible() -> bool:
    """Whether `begin` may be used: elsewhere than on Linux, libraries do not stand a fork."""
    return _claimed and sys.platform == "linux"


def begin(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Begin `function(*arguments)` with lean imports, in a forked process; what is returned waits for the result.

    That raises ChildProcessError if there is none, whatever the reason; the child is gone in any case.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(receiver, sender, function, *arguments), daemon=True)
    with suppress(OSError):  # no process to be had, which shows as the end of the pipe
        child.start()
    sender.close()

    def result() -> Any:
        try:
            if not receiver.poll(PATIENCE_SECONDS):
                raise TimeoutError
            return receiver.recv()
        except Exception as error:  # it has ended, or was killed in the middle of a word, or hangs
            raise ChildProcessError("planning with lean imports has failed") from error
        finally:
            receiver.close()
            if child.pid is not None:
                child.kill()
                child.join()
            gc.freeze()
            gc.set_threshold(*_gc_threshold)

    return result


def _answer(receiver: Any, sender: Any, function: Callable[..., Any], *arguments: Any) -> None:
    receiver.close()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the parent, too, which says what there is to say
    with suppress(Exception):  # the parent will meet it again, or not; or it has gone
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        _hide()
        sender.send(function(*arguments))
    sender.close()
    os._exit(0)  # nothing here is worth the time of taking it apart


def _hide() -> None:
    """Hide what planning does not need, for the rest of this process."""
    import torch

    sys.modules.update((name, None) for name in UNNEEDED if name not in sys.modules)  # type: ignore[misc]
    if COMPILER not in sys.modules:
        sys.meta_path.insert(0, _InertFinder())
    torch.distributed.is_available = lambda: False
    # it reads the file lists of all installed packages; transformers before 5.23 calls it on import
    importlib.metadata.packages_distributions = dict


class _Inert(ModuleType):
    """A module all of whose names are decorators that change nothing, or are false."""

    __path__: MutableSequence[str] = []  # noqa: RUF012  # a package, so that it may have submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else lambda function: function

    def __bool__(self) -> bool:
        return False


class _InertFinder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        ours = name == COMPILER or name.startswith(COMPILER + ".")
        return ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Inert(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
