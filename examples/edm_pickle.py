"""Writes a network as NVlabs' training code would: a pickle that `bootcli` and that code read.

What a real file holds besides the numbers is here too, so that a reader is tried on it: the source of the classes
(there it is needed to unpickle; here it is a note), the state of every layer, hooks, numpy scalars, and in a training
snapshot the loss and the arguments of the dataset.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bootcli_edm.architecture import Architecture
from bootcli_edm.layers import ResampleConv2d, UNetBlock
from torch import nn

from bootcli.store.files import atomic_file

VERSION = 6
SOURCE = '"""Written by bootcli: these classes are described, not included. They are those of NVlabs\' EDM code."""\n'


class EasyDict(dict[str, Any]):
    """A dictionary, as the training code keeps its options."""


class Persistent:
    """Stands for an object of the training code that is no module.

    Args:
        class_name: of it.
        state: its ``__dict__``.
    """

    def __init__(self, class_name: str, state: Mapping[str, object]) -> None:
        self.class_name, self.state = class_name, dict(state)


def rebuild(meta: object) -> object:
    """Stands for the function that a plain unpickler would call."""
    raise RuntimeError("an EDM pickle is not to be unpickled here")


@contextmanager
def named_as_there() -> Iterator[None]:
    """While it lasts, ``rebuild`` and `EasyDict` can be pickled under the names they have in NVlabs' code."""
    modules = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    before = {name: sys.modules.get(name) for name in modules}
    homes = ((rebuild, "torch_utils.persistence", "_reconstruct_persistent_obj"), (EasyDict, "dnnlib.util", "EasyDict"))
    kept = [(thing, thing.__module__, thing.__name__, thing.__qualname__) for thing, *_ in homes]
    try:
        sys.modules.update(modules)
        for thing, module, name in homes:
            setattr(modules[module], name, thing)
            thing.__module__, thing.__name__, thing.__qualname__ = module, name, name
        yield
    finally:
        for thing, module, name, qualname in kept:
            thing.__module__, thing.__name__, thing.__qualname__ = module, name, qualname
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Pickler(pickle.Pickler):
    """Pickles layers as persistent objects; containers as torch does."""

    def reducer_override(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        if isinstance(obj, Persistent):
            return rebuild, (_meta(obj.class_name, obj.state),)
        if isinstance(obj, nn.Module) and not isinstance(obj, nn.ModuleDict | nn.ModuleList | nn.Sequential):
            return rebuild, (_meta(*_described(obj)),)
        return NotImplemented


def _meta(class_name: str, state: Mapping[str, object]) -> dict[str, object]:
    return {"type": "class", "version": VERSION, "module_src": SOURCE, "class_name": class_name, "state": dict(state)}


def _described(module: nn.Module) -> tuple[str, dict[str, object]]:
    """Class and ``__dict__`` of a layer, as the training code has them."""
    state = {name: value for name, value in vars(module).items() if name.startswith("_") or name == "training"}
    state |= {"_init_args": (), "_init_kwargs": {}}
    match module:
        case Root():
            return module.class_name, state | {"_init_kwargs": module.arguments}
        case UNetBlock():
            return "UNetBlock", state | {"skip_scale": np.float64(module.skip_scale), "num_heads": module.heads}
        case nn.Linear():
            return "Linear", state | {"in_features": module.in_features, "out_features": module.out_features}
        case ResampleConv2d():
            return "Conv2d", state | {"up": module.resample == "up", "down": module.resample == "down"}
        case nn.Conv2d():
            return "Conv2d", state | {"_buffers": OrderedDict(resample_filter=None), "up": False, "down": False}
        case nn.GroupNorm():
            return "GroupNorm", state | {"num_groups": np.int64(module.num_groups), "eps": module.eps}
        case _:
            return type(module).__name__, state


class Root(nn.Module):
    """The preconditioner of the training code.

    Args:
        architecture: of the network.
        net: with its weights.
    """

    def __init__(self, architecture: Architecture, net: nn.Module) -> None:
        super().__init__()
        self.class_name = architecture.class_name
        own = {
            name: value
            for name, value in architecture.wrapper.model_dump().items()
            if name in architecture.wrapper.model_fields_set
        }
        self.arguments = own | {
            name: value
            for name, value in architecture.unet.model_dump().items()
            if name in architecture.unet.model_fields_set
        }
        self.model = net.get_submodule("model")
        table = dict(net.named_buffers(recurse=False)).get("u")
        if table is not None and table.numel():
            self.register_buffer("u", table)


def write_pickle(path: Path, architecture: Architecture, net: nn.Module, *, snapshot: bool = False) -> None:
    """Write ``net`` as a network file; with ``snapshot`` as what training leaves behind.

    Args:
        path: of the file.
        architecture: of the network.
        net: a `Preconditioned`, on the CPU.
        snapshot: whether the loss and the arguments of the dataset are in it too.
    """
    content: dict[str, object] = {"ema": Root(architecture, net).eval().requires_grad_(False)}
    if snapshot:
        content["loss_fn"] = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
        content["augment_pipe"] = Persistent("AugmentPipe", {"p": np.float64(0.12), "rotate_frac_max": math.pi})
        content["dataset_kwargs"] = EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=True)
    buffer = io.BytesIO()
    with named_as_there():
        Pickler(buffer, protocol=4).dump(content)
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
