"""Train the small text-to-image teacher `fashion-sd`: a genuine Stable Diffusion pipeline of 32x32 clothing.

Three parts, one after the other: an own tokenizer in CLIP's format; an autoencoder to 8x8 latents; a text encoder and a
UNet together, with a tenth of the captions left out, so that guidance works.

    python examples/train_sd_teacher.py --output fashion-sd --work runs/sd-teacher --minutes 60 --vae-minutes 15
"""

from __future__ import annotations

import copy
import itertools
import string
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bootcli_sd.export import save_pipeline
from captioned_fashion import SIDE, Batch, all_captions, draw
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fashion_data import read_idx
from teacher_training import Losses, parser, save_curve, step_generator, stratified, train
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 24
VOCABULARY = 700
CAPTION_DROPOUT = 0.1
PROMPTS = 2000
"""Captions that go with the teacher."""
KL_WEIGHT = 1e-4
VAE_BATCH = 64
"""Images of a step of the autoencoder, which gains more from steps than from their size."""
TIMES = (0, 50, 200, 500, 1000)


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, with byte pairs learned from the captions; each letter is a word, so that none is unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    plain = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)
    texts = [*all_captions(), *string.ascii_lowercase, *string.digits, *string.punctuation]
    return plain.train_new_from_iterator(texts, VOCABULARY, initial_alphabet=letters, show_progress=False)


def make_vae() -> AutoencoderKL:
    """32x32 pixels to 8x8 latents of four channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """Cross-attention at both resolutions of the latents; of one head, since narrow ones are slow on CPUs."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(48, 96),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=1,  # the number of heads, by diffusers' name
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def make_scheduler() -> DDIMScheduler:
    """That of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


class Captioned:
    """Batches of captioned images, addressed by step."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.pieces = read_idx(folder / "train-images-idx3-ubyte.gz")[:, None]
        self.classes = read_idx(folder / "train-labels-idx1-ubyte.gz").long()
        self.batch_size = batch_size

    def __call__(self, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(self.pieces), (self.batch_size,), generator=generator)
        return draw(self.pieces[rows], self.classes[rows], generator)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


class Conditioned(nn.Module):
    """Text encoder and UNet as one network to train.

    Args:
        tokenizer: of the text encoder.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = make_text_encoder(tokenizer)
        self.unet = make_unet()

    def forward(self, x_t: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """eps, (n, 4, 8, 8)."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        text = self.text_encoder(tokens.input_ids).last_hidden_state
        prediction: Tensor = self.unet(x_t, t, encoder_hidden_states=text, return_dict=False)[0]
        return prediction


def train_vae(args: Any) -> AutoencoderKL:
    """Reconstruction and a little pull to a standard normal; scaled to unit variance afterwards."""
    batches = Captioned(args.data, VAE_BATCH)
    vae, ema = make_vae(), make_vae().requires_grad_(False)
    ema.load_state_dict(vae.state_dict())

    def losses(step: int, generator: torch.Generator) -> Losses:
        x = to_unit(batches(generator).images)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        drawn = vae.decode(z).sample
        error = (drawn.float() - x).abs().mean(dim=(1, 2, 3))
        kl = posterior.kl() / x[0].numel()
        return Losses(error + KL_WEIGHT * kl.float(), torch.zeros(len(x)))

    options = copy.copy(args)
    options.minutes, options.work, options.batch_size = args.vae_minutes, args.work / "vae", VAE_BATCH
    train(options, vae, ema, losses, (0, 0.5, 1), lambda: None)
    with torch.no_grad():
        x = to_unit(batches(step_generator(args.seed, -1 % 2**31)).images)
        z = ema.encode(x).latent_dist.mean
        ema.register_to_config(scaling_factor=1 / float(z.std()))
        save_grid_rgb(torch.cat([x[:32], ema.decode(z[:32]).sample]), options.work / "reconstructions.png")
    return ema.eval()


def save_grid_rgb(images: Tensor, path: Path) -> None:
    """Images (n, 3, h, w) in [-1, 1], 16 in a row, as `save_grid` does for grey ones."""
    from torchvision.utils import save_image

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image((images.clamp(-1, 1) + 1) / 2, path, nrow=16, padding=1)


def main() -> None:
    """Train, checkpoint, export."""
    options = parser(__doc__, steps=60_000)
    options.add_argument("--vae-minutes", type=float, default=15.0)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    batches, tokenizer, scheduler = Captioned(args.data, args.batch_size), make_tokenizer(), make_scheduler()
    vae = train_vae(args)
    model = Conditioned(tokenizer)
    ema = copy.deepcopy(model).requires_grad_(False)
    total, scale = int(scheduler.config.num_train_timesteps), vae.config.scaling_factor

    def losses(step: int, generator: torch.Generator) -> Losses:
        batch = batches(generator)
        with torch.no_grad():
            x_0 = vae.encode(to_unit(batch.images)).latent_dist.mean.float() * scale
        eps = torch.randn(x_0.shape, generator=generator)
        t = (stratified(len(x_0), generator) * total).long().clamp(max=total - 1)
        told = torch.rand(len(x_0), generator=generator) >= CAPTION_DROPOUT
        captions = [caption if kept else "" for caption, kept in zip(batch.captions, told.tolist(), strict=True)]
        prediction = model(scheduler.add_noise(x_0, eps, t), t, captions)
        return Losses(F.mse_loss(prediction.float(), eps, reduction="none").mean(dim=(1, 2, 3)), t)

    def export() -> None:
        parts = (copy.deepcopy(part).half() for part in (vae, ema))
        save_pipeline(pipeline(*parts, tokenizer, scheduler), args.output)

    minutes = train(args, model, ema, losses, TIMES, export)
    captions = draw_captions(batches, args.seed)
    (args.output / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    save_samples(pipeline(vae, ema, tokenizer, scheduler), args.work / "samples.png")
    log, curve = args.work / "log.jsonl", args.work / "curve.png"
    save_curve(log, curve, "fashion-sd teacher, training loss", "eps mean squared error", "all t", "t in [{})")
    print(f"trained for {minutes:.1f} min, exported to {args.output}")


def draw_captions(batches: Captioned, seed: int) -> list[str]:
    """Captions as training saw them: what its students are distilled with."""
    many = copy.copy(batches)
    many.batch_size = PROMPTS
    return many(step_generator(seed, 2**31)).captions


def pipeline(vae: AutoencoderKL, ema: Conditioned, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler) -> Any:
    """What has been learned, as diffusers runs it."""
    nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        vae=vae, text_encoder=ema.text_encoder, tokenizer=tokenizer, unet=ema.unet, scheduler=scheduler, **nothing
    )


def save_samples(made: Any, path: Path) -> None:
    """Sixteen prompts in 25 steps, without guidance and with."""
    made.set_progress_bar_config(disable=True)
    prompts = list(itertools.islice(itertools.cycle(all_captions()[::97]), 16))
    rows = [
        made(prompts, num_inference_steps=25, guidance_scale=w, generator=torch.manual_seed(0), output_type="np").images
        for w in (1.0, 3.0)
    ]
    images = torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
    save_grid_rgb(torch.cat(images).permute(0, 3, 1, 2) * 2 - 1, path)


if __name__ == "__main__":
    main()
