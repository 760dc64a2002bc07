"""Planning without the weight of what transformers imports on the way: for the command line alone.

`import transformers` of a decoder pulls in whatever optional package is installed (torchvision, scikit-learn, pandas),
torch's compiler and torch's distributed tensors: most of a short run. None of it shapes a model that is only built. So
in a process that is ours, and for the time of the planning, the packages look absent (`sys.modules[name] = None` is
Python's own way to say so), and the compiler is a module whose decorators decorate nothing. A plan that fails this way
is made once more in a fresh process without any of this, which has the last word.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
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

_claimed, _gc_threshold = False, gc.get_threshold()


def claim_process() -> None:
    """Say that this process runs nothing but the `loftq` command: a library must not hide packages from its host."""
    global _claimed
    _claimed = True
    gc.set_threshold(200_000)  # imports make a million objects that stay: looking for garbage among them takes 0.7 s


def possible() -> bool:
    """Whether packages may be hidden here; once transformers is imported, it would be in vain."""
    return _claimed and "transformers" not in sys.modules


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, of a module's own function and picklable arguments, in a process that hides nothing."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def imports() -> Iterator[None]:
    """Hide what planning does not need; afterwards, Python finds it all again (transformers does not)."""
    import importlib.metadata

    import torch

    hidden = [name for name in UNNEEDED if name not in sys.modules]
    finder = _InertFinder()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is meant
    if COMPILER not in sys.modules:
        sys.meta_path.insert(0, finder)
    try:
        with (
            _replaced(torch.distributed, "is_available", lambda: False),
            # it reads the file lists of all installed packages; transformers before 5.23 calls it on import
            _replaced(importlib.metadata, "packages_distributions", dict),
        ):
            yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for name in [name for name, module in list(sys.modules.items()) if isinstance(module, _Inert)]:
            del sys.modules[name]
        if isinstance(vars(torch).get("_dynamo"), _Inert):
            del torch._dynamo  # torch imports the real one when it is asked for
        for name in hidden:
            sys.modules.pop(name, None)
        gc.freeze()
        gc.set_threshold(*_gc_threshold)


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


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
