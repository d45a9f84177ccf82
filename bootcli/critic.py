"""The critic g: a denoiser of the student's own samples (VSD: Wang et al. 2023, arXiv 2305.16213).

It begins as the teacher, either as a full copy or as a LoRA on the teacher's own weights, which are then held once.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

from torch import Tensor, nn

from bootcli.config import CorrectionConfig
from bootcli.lora import Lora
from bootcli.teachers.protocol import Cond, Teacher


class Critic(nn.Module):
    """g's raw prediction, of the teacher's type.

    Args:
        teacher: its family's knowledge, and the weights to begin with.
        config: full copy or LoRA, rank.
        guidance_range: least and greatest w of samples whose w differs: g is told w, since it is not of one student
            but of one for each w. None: w is the same for all. Of whole networks only.

    Raises `UsageError` for a LoRA where the teacher names no modules for one.
    """

    net: nn.Module

    def __init__(
        self, teacher: Teacher, config: CorrectionConfig, guidance_range: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.lora = Lora(teacher, "critic", config.lora_rank) if config.critic == "lora" else None
        if self.lora is None:
            self.net = copy.deepcopy(teacher.net).float().requires_grad_(True)
            if guidance_range is not None:
                teacher.add_guidance_input(self.net, guidance_range)
        else:
            self.__dict__["net"] = teacher.net  # not registered: what the critic learns is the LoRA

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The raw prediction, (b, c, h, w); t (b,) float64 on the CPU."""
        with nullcontext() if self.lora is None else self.lora.active():
            return self.teacher.predict(self.net, x_t, t.cpu(), cond)  # several processes move it to a GPU
