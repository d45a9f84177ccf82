"""Device, precision and processes, which accelerate takes care of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
from accelerate import Accelerator, cpu_offload_with_hook
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from bootcli.config import Device, MixedPrecision
from bootcli.errors import DoesNotFit, UsageError


def pick_device(device: Device) -> torch.device:
    """The device a name means here. Raises `UsageError` for one this machine lacks."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    if not available[device]:
        raise UsageError(f"Device {device} is not available here.", "Leave --device out, or use --device cpu.")
    return torch.device(device)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is native there: emulated, it is slower than float32. Some CPUs have it (AVX512_BF16, AMX)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had not enough memory."""
    return isinstance(error, DoesNotFit) or bool(should_reduce_batch_size(error))


class Engine:
    """Runs networks: where, in what precision, in how many processes.

    Args:
        device: where.
        mixed_precision: None is bf16 where the hardware multiplies it, otherwise no.
    """

    def __init__(self, device: Device = "auto", mixed_precision: MixedPrecision | None = None) -> None:
        chosen = pick_device(device)
        if mixed_precision is None:
            mixed_precision = "bf16" if multiplies_bf16(chosen) else "no"
        if mixed_precision == "fp16" and chosen.type == "cpu":
            raise UsageError("fp16 needs a GPU.", "Use --mixed-precision bf16 or no.")
        # accelerate keeps the first device of a process: a GPU that comes after the CPU would not be taken.
        held = PartialState._shared_state.get("device", chosen)
        AcceleratorState._reset_state(reset_partial_state="cpu" in (chosen.type, held.type))
        # One process scores and draws previews while the others wait, for longer than torch's ten minutes.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
        self._accelerator = Accelerator(
            mixed_precision=mixed_precision, cpu=chosen.type == "cpu", kwargs_handlers=[patience]
        )
        self.mixed_precision: MixedPrecision = mixed_precision

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self._accelerator.device)

    @property
    def rank(self) -> int:
        """Index of this process, 0 for the main one."""
        return int(self._accelerator.process_index)

    @property
    def num_processes(self) -> int:
        """How many processes share the batch."""
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return bool(self._accelerator.is_main_process)

    @property
    def half(self) -> torch.dtype:
        """What mixed precision multiplies in."""
        return torch.float16 if self.mixed_precision == "fp16" else torch.bfloat16

    def autocast(self) -> AbstractContextManager[object]:
        """Networks inside compute in the mixed precision."""
        # Until torch 2.10 or so, half copies of weights that are first made without gradient, for a target, were then
        # taken for the call with gradient too, and the weights got none.
        context: AbstractContextManager[object] = self._accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return context

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module and optimiser made ready for several processes and loss scaling."""
        module, optimizer = self._accelerator.prepare(module, optimizer)
        # Our own `autocast` stands around every loss; accelerate's, inside forward, could not be switched off there.
        self._accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        return module, optimizer

    def offload(self, module: nn.Module) -> Callable[[], None]:
        """Hold a module on the CPU until it is called; what is returned sends it back there."""
        _, hook = cpu_offload_with_hook(module, self.device)
        return lambda: hook.offload()

    def largest_that_fits(self, attempt: Callable[[int], None], sizes: Sequence[int]) -> int:
        """The first of some falling sizes for which ``attempt`` does not run out of memory.

        Raises `DoesNotFit` where there is none.
        """
        left = iter([*sizes[1:], 0])

        @find_executable_batch_size(starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(left))  # type: ignore[untyped-decorator]
        def run(batch_size: int) -> int:
            attempt(batch_size)
            return batch_size

        try:
            return int(run())
        except RuntimeError as error:
            if "reached zero" not in str(error):
                raise
            raise DoesNotFit(
                f"Not even a micro-batch of {sizes[-1]} fits into the memory of {self.device}.",
                "What would make it fit says: bootcli distill --dry-run",
            ) from None

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients, scaled where the precision needs it."""
        self._accelerator.backward(loss)

    def clip(self, modules: Iterable[nn.Module], max_norm: float) -> list[float]:
        """Clip the gradient norm of each module; returns them as they were."""
        self._accelerator.unscale_gradients()  # once for all: a second time is refused
        return [float(nn.utils.clip_grad_norm_(module.parameters(), max_norm)) for module in modules]

    def step(self, optimizers: Iterable[torch.optim.Optimizer], rates: Iterable[float]) -> None:
        """Step each prepared optimiser at its learning rate, and forget the gradients.

        With a loss scaler those whose gradients are not finite stay where they are. The scale changes once, after all
        of them: accelerate's own step changes it each time, and unscales the next optimiser's gradients again.
        """
        scaler = self.scaler
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer.optimizer)  # type: ignore[attr-defined]
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()

    def no_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Do not exchange gradients: for all micro-batches but the last."""
        context: AbstractContextManager[object] = self._accelerator.no_sync(module)
        return context

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        reduced: Tensor = self._accelerator.reduce(value, reduction="mean")
        return reduced

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order; all have equally many."""
        gathered: Tensor = self._accelerator.gather(rows)
        return gathered

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must ask at the same point."""
        if self.num_processes == 1:
            return value
        return int(self._accelerator.gather(torch.tensor([value], device=self.device)).max())

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16, part of the state."""
        scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        return scaler
