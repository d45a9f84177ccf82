"""Prompts to what the network is conditioned on: CLIP's text encoders, as diffusers' pipelines use them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging

from bootcli.plugin import BootError
from bootcli_sd.layout import variant_of
from bootcli_sd.loading import check_whole, quietly

logging.disable_progress_bar()  # bootcli has its own

BATCH = 32
"""Prompts encoded at a time."""


Pair = tuple[Any, Any]
"""A text encoder of transformers, and its tokenizer."""


def load_pairs(folders: Sequence[tuple[Path, Path]]) -> list[Pair]:
    """Encoders and tokenizers from their folders. Raises `BootError` for a broken one."""
    pairs: list[Pair] = []
    for place, (encoder, tokenizer) in enumerate(folders):
        kind = CLIPTextModelWithProjection if place else CLIPTextModel
        how = {"variant": variant_of(encoder), "dtype": torch.float32}
        try:
            with quietly():
                model, told = kind.from_pretrained(encoder, local_files_only=True, output_loading_info=True, **how)
            words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except Exception as error:  # whatever transformers says of what is missing or broken
            raise BootError(
                f"The text encoder in {encoder.parent} cannot be loaded ({type(error).__name__}: {error!s:.300}).",
                "Download the teacher again.",
            ) from None
        check_whole(encoder, told["missing_keys"])
        pairs.append((model.eval().requires_grad_(False), words))
    return pairs


def digest_of(folders: Sequence[tuple[Path, Path]], *, zero_negative: bool) -> str:
    """A hash of all files of encoders and tokenizers, read as they are."""
    digest = hashlib.blake2b(repr(zero_negative).encode(), digest_size=16)
    for folder in (folder for pair in folders for folder in pair):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with path.open("rb") as file:
                digest.update(f"{folder.name}/{path.name}".encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


class TextEncoder:
    """One encoder (Stable Diffusion), or two side by side (SDXL).

    Args:
        pairs: each encoder with its tokenizer.
        zero_negative: whether None is an embedding of zeros instead of that of an empty text.
    """

    def __init__(self, pairs: Sequence[Pair], *, zero_negative: bool = False) -> None:
        self.pairs = pairs
        self.zero_negative = zero_negative

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """``text`` (b, tokens, width), and for two encoders ``pooled`` (b, width of the second); where the encoders
        are."""
        parts = [self._encode(prompts[first : first + BATCH]) for first in range(0, len(prompts), BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def to(self, device: torch.device) -> TextEncoder:
        """The same on a device."""
        for model, _ in self.pairs:
            model.to(device)
        return self

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """See `Teacher.too_long`."""
        _, words = self.pairs[0]
        tokens = words(list(prompts), verbose=False).input_ids
        return [i for i, each in enumerate(tokens) if len(each) > words.model_max_length]

    def _encode(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        texts = ["" if prompt is None else prompt for prompt in prompts]
        outputs = [self._run(model, words, texts) for model, words in self.pairs]
        if len(outputs) == 1:
            return {"text": outputs[0].last_hidden_state}
        # SDXL reads the layer before the last of both, and the sentence embedding of the second.
        encoded = {
            "text": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "pooled": outputs[-1].text_embeds,
        }
        if self.zero_negative:
            for row, prompt in enumerate(prompts):
                if prompt is None:
                    for tensor in encoded.values():
                        tensor[row] = 0
        return encoded

    def _run(self, model: Any, words: Any, texts: list[str]) -> Any:
        tokens = words(
            texts, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt"
        )
        alone = len(self.pairs) == 1
        mask = tokens.attention_mask if alone and getattr(model.config, "use_attention_mask", False) else None
        mask = None if mask is None else mask.to(model.device)
        return model(tokens.input_ids.to(model.device), attention_mask=mask, output_hidden_states=not alone)
