"""A second device made of the CPU's memory, for machines without a GPU: what would fail on one fails there too.

Tensors "elsewhere" say that they are on `ELSEWHERE` and compute on the CPU. As on a GPU, an operation must not mix them
with tensors of the CPU (but for single numbers and indices); as on a Mac, there is no float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import __future__ as future
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

ELSEWHERE = torch.device("meta")
"""Named after the one device that needs no hardware; here it has values."""
_aten = torch.ops.aten
INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default, _aten.index_put.default}
COPIES = {_aten._to_copy.default, _aten.copy_.default}


class Elsewhere(Tensor):
    """A tensor elsewhere; ``here`` has its values."""

    here: Tensor
    float64 = False

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        if here.dtype == torch.float64 and not cls.float64:
            raise TypeError("Elsewhere has no float64.")
        tensor: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=ELSEWHERE,
        )  # fmt: skip
        tensor.here = here
        return tensor

    def __repr__(self, **_: object) -> str:
        return f"Elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def _swapped(tree: Any, kind: type, of: Callable[[Any], Any]) -> Any:
    """Every ``kind`` in what an operation takes or gives; torch's own maps of trees take most of a run's time here."""
    if isinstance(tree, kind):
        return of(tree)
    if type(tree) in (tuple, list):
        return type(tree)([_swapped(each, kind, of) for each in tree])
    return tree


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the values, its results where they belong."""
    tensors: list[Tensor] = []
    _swapped((*args, *kwargs.values()), Tensor, tensors.append)
    away = any(isinstance(each, Elsewhere) for each in tensors)
    wanted = kwargs.get("device")
    if func not in COPIES:
        bound = args[:1] if func in INDEXED else tensors
        if away and any(each.dim() and not isinstance(each, Elsewhere) for each in bound):
            raise RuntimeError(f"{func}: tensors on two devices, {[tuple(each.shape) for each in tensors]}.")
    if wanted is not None:
        away = torch.device(wanted) == ELSEWHERE
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif func is _aten.copy_.default:
        away = isinstance(args[0], Elsewhere)
    values = _swapped((*args, *kwargs.values()), Elsewhere, attrgetter("here"))
    result = func(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
    if not away:
        return result
    result = _swapped(result, Tensor, Elsewhere)
    return return_and_correct_aliasing(func, args, kwargs, result) if tensors and wanted is None else result


class _Dispatch(TorchDispatchMode):
    """Sees operations on tensors of the CPU and on none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Sees what asks no dispatcher: `torch.tensor` makes empty ones for this device, and no subclass has a list."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, Tensor.new_tensor):
            device = kwargs.pop("device", args[0].device if func is Tensor.new_tensor else "cpu")
            return func(*args, **kwargs, device="cpu").to(device)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


@contextmanager
def elsewhere(*, float64: bool = False) -> Iterator[torch.device]:
    """`ELSEWHERE` has values inside, and every engine computes there. Load teachers before: that needs the real one.

    Args:
        float64: whether it has such numbers, as GPUs do.
    """
    future.set_swap_module_params_on_conversion(True)  # parameters that are moved stay the same objects, as on a GPU
    patches = (
        mock.patch.object(Accelerator, "device", ELSEWHERE),
        mock.patch.object(Elsewhere, "float64", float64),
        mock.patch.object(torch, "autocast", return_value=nullcontext()),  # there is one precision
    )
    try:
        with ExitStack() as stack:
            for each in (*patches, _Literals(), _Dispatch()):
                stack.enter_context(each)  # type: ignore[arg-type]
            yield ELSEWHERE
    finally:
        future.set_swap_module_params_on_conversion(False)
