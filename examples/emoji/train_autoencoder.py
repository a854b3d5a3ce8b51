"""The autoencoder: 64 x 64 pixels <-> 4 x 16 x 16 latents (diffusers' AutoencoderKL, as in Stable Diffusion).

    python examples/emoji/train_autoencoder.py --data build/emoji --out build/emoji/vae

Loss: |x - y| + 0.5 |difference of neighbours| + 1e-4 KL. At the end each latent channel is brought to mean 0 and
variance 1 inside the two 1 x 1 convolutions around the latents, so that `scaling_factor` is 1 and diffusion sees
unit-variance data.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from common import make_parser, update
from diffusers import AutoencoderKL
from safetensors.torch import load_file


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def loss_of(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    pixels = (decoded - images).abs().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(images), strict=True))
    return pixels + 0.5 * edge + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel(), pixels


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold (latent - mean) / std per channel into `quant_conv`, and its inverse into `post_quant_conv`: exact."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.bias[:4] -= mean
    encode.weight[:4] /= std.view(4, 1, 1, 1)
    encode.bias[:4] /= std
    encode.bias[4:] -= 2 * std.log()  # the other half is the log-variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std.view(1, 4, 1, 1)


def main() -> None:
    parser = make_parser(__doc__, out="build/emoji/vae", steps=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()

    data = load_file(args.data / "pictures.safetensors")
    images = torch.cat([data["images"], data["everything"]])
    torch.manual_seed(args.seed)
    vae = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    began = time.monotonic()
    for step in range(args.steps):
        batch = images[torch.randint(len(images), (args.batch,))].float() / 127.5 - 1
        batch = batch.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, pixels = loss_of(vae, batch)
        update(loss, optimizer, schedule)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"{step:5d}  |x - y| {float(pixels):.4f}  {time.monotonic() - began:.0f} s", flush=True)

    vae.eval()
    held = data["images"][::25].float() / 127.5 - 1
    normalise_latents(vae, held)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in held.split(64)])
        decoded = torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / F.mse_loss(decoded, held))
    print(f"latent mean {latents.mean():+.3f}, std {latents.std():.3f}; PSNR {psnr:.2f} dB on {len(held)} pictures")
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
