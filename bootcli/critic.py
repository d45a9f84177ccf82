"""The critic g: a denoiser of the student's own samples (VSD: Wang et al. 2023, arXiv 2305.16213).

It begins as the teacher, either as a full copy or as a LoRA on the teacher's own weights, which are then held once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bootcli.config import CorrectionConfig
from bootcli.errors import UsageError
from bootcli.teachers.protocol import Cond, Teacher


class Critic(nn.Module):
    """g's raw prediction, of the teacher's type.

    Args:
        teacher: its family's knowledge, and the weights to begin with.
        config: full copy or LoRA, rank.
        guidance_range: least and greatest w of samples whose w differs: g is told w, since it is not of one student
            but of one for each w. None: w is the same for all.

    Raises `UsageError` for a LoRA where the teacher names no modules for one, or where w differs.
    """

    def __init__(
        self, teacher: Teacher, config: CorrectionConfig, guidance_range: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.teacher = teacher
        if config.critic == "full":
            self.net = copy.deepcopy(teacher.net).float().requires_grad_(True)
            self._adapters: list[nn.Module] = []
            if guidance_range is not None:
                teacher.add_guidance_input(self.net, guidance_range)
            return
        if guidance_range is not None:
            raise UsageError(
                "correction.critic = lora shares the teacher's network, which has no input for a guidance scale.",
                "With --guidance-range use --set correction.critic=full.",
            )
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = teacher.lora_targets()
        if not targets:
            raise UsageError("This teacher names no modules for a LoRA.", "Use --set correction.critic=full.")
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=list(targets))
        self.net = inject_adapter_in_model(lora, teacher.net)
        self._adapters = [module for module in self.net.modules() if isinstance(module, BaseTunerLayer)]
        self._switch(on=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The raw prediction, (b, c, h, w); t (b,) float64 on the CPU."""
        with self._adapted():
            return self.teacher.predict(self.net, x_t, t, cond)

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        self._switch(on=True)
        try:
            yield
        finally:
            self._switch(on=False)

    def _switch(self, *, on: bool) -> None:
        # peft's own switch also freezes the adapters, and a backward pass that comes later would leave them out.
        for adapter in self._adapters:
            adapter._disable_adapters = not on  # type: ignore[assignment]
