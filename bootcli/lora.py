"""A LoRA (Hu et al. 2021, arXiv 2106.09685) in the teacher's own network, which is there in its owner's calls alone.

Teacher, student and critic then share one frozen base, and memory holds it once. Each owner's adapter is on inside its
own calls; the teacher, and the judge that looks through it, never see one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bootcli.errors import UsageError
from bootcli.teachers.protocol import LoraWeights, Teacher

LOOKED_AT = 1024
"""Values of each tensor that a fingerprint is made of."""


class Lora(nn.Module):
    """One adapter. What is registered are its own weights, so that its owner steps, averages and saves nothing else.

    Args:
        teacher: whose network is the base; frozen.
        name: of the owner.
        rank: of the changes; they are added as they are (peft's alpha is the rank).
        base: the `fingerprint` of the base.
        targets: name endings of the modules that it changes; None: those that the teacher names.

    Raises `UsageError` where the teacher names no modules for a LoRA.
    """

    def __init__(
        self, teacher: Teacher, name: str, rank: int, base: str = "", targets: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = teacher.lora_targets() if targets is None else targets
        if not targets:
            raise UsageError("This teacher names no modules for a LoRA.", "Train whole networks instead.")
        self.name, self.rank, self.base, self.targets = name, rank, base, tuple(targets)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
        net = inject_adapter_in_model(lora, teacher.net, name)
        del net.peft_config  # peft's note of it, about which it warns the next owner
        self._net = (net,)  # in a tuple: a module would be registered
        self._layers = [layer for layer in net.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in self._layers:
            if _cast_once not in layer._forward_pre_hooks.values():  # other owners have the same layers
                layer.register_forward_pre_hook(_cast_once)
        mark, own = f".{name}.", {}
        for key, parameter in net.named_parameters():
            if ".lora_" in key:
                parameter.requires_grad_(True)  # peft freezes the adapters of others
                if mark in key:
                    parameter.data = parameter.data.float()  # peft takes the precision of the base
                    own[key.replace(mark, ".").replace(".", "/")] = parameter
        self.weights = nn.ParameterDict(own)
        self._switch([])

    def _switch(self, names: Sequence[str]) -> None:
        # peft's own switch also freezes the adapters, and a backward pass that comes later would leave them out.
        for layer in self._layers:
            layer._active_adapter = names

    @property
    def _on(self) -> Sequence[str]:
        names: Sequence[str] = self._layers[0]._active_adapter
        return names

    def active(self) -> AbstractContextManager[None]:
        """Inside, the network is the owner's."""
        return _With(self, [self.name])

    def checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Gradient checkpointing of a part of the network that is called again, in the backward pass, with the adapter
        that it had: by then its owner's call is over."""
        names = self._on
        return checkpoint(
            function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _With(self, names))
        )  # fmt: skip

    def exported(self, tensors: Mapping[str, Tensor]) -> LoraWeights:
        """The adapter as others know it; ``tensors`` are by the names of this module's state."""
        named = {key.removeprefix("weights.").replace("/", "."): tensor for key, tensor in tensors.items()}
        return LoraWeights(named, self.rank, self.targets, self.base)

    def take(self, weights: LoraWeights) -> None:
        """Be the adapter that `exported` gave."""
        self.load_state_dict({f"weights.{key.replace('.', '/')}": t for key, t in weights.tensors.items()})

    def merge(self) -> nn.Module:
        """Add the changes to the weights of the base and take the adapter away; what stays is a stock network."""
        net: nn.Module = self._net[0]
        for name, layer in list(net.named_modules()):
            if layer in self._layers:
                layer.merge(adapter_names=[self.name])
                parent, _, child = name.rpartition(".")
                setattr(net.get_submodule(parent), child, layer.get_base_layer())
        return net


def _cast_once(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In mixed precision, cast what comes in for base and adapter together. Else peft casts it up for the adapter and
    autocast down again, and the backward pass keeps two copies of what each layer is given."""
    x, *others = inputs
    kind = x.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    layer.cast_input_dtype_enabled = not mixed
    return (x.to(torch.get_autocast_dtype(kind)) if mixed else x, *others)


class _With(AbstractContextManager[None]):
    """Inside, a network has the adapters of these owners and no other. It can be entered again and again: where a graph
    is kept, a part of it is called anew in each backward pass."""

    def __init__(self, lora: Lora, names: Sequence[str]) -> None:
        self.lora, self.names = lora, names

    def __enter__(self) -> None:
        self.before = self.lora._on
        self.lora._switch(self.names)

    def __exit__(self, *args: object) -> None:
        self.lora._switch(self.before)


@torch.no_grad()
def fingerprint(net: nn.Module) -> str:
    """What tells the weights of a network from those of another: a digest of names, shapes and many values of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        values = tensor.reshape(-1)
        few = values[:: max(1, len(values) // LOOKED_AT)].cpu()
        digest.update(few.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()
