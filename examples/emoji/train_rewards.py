"""The picture-name reward, by the sigmoid loss over all captions (arXiv 2303.15343).

    python examples/emoji/train_rewards.py --data build/emoji --vae build/emoji/vae

A picture's own caption is the one positive of 200. Malformed pictures (two blended, tiles shuffled, decoded from noisy
latents) have no positive at all, so that a high reward also means a picture in one piece. Pictures that went through
the autoencoder count as pictures too: it shall not ask for more than that can draw. The last eight views of each
caption are kept for the figures printed at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import make_parser, update
from diffusers import AutoencoderKL
from rewards import ImageNetTower, PictureName, captions, imagenet, sentence_encoder
from safetensors.torch import load_file, save_file

from diffpp_fast import ops

HELD_VIEWS = 8


class Views(NamedTuple):
    """Pictures [N, 3, 64, 64], the number of each one's caption, and the embeddings of all captions."""

    images: torch.Tensor
    labels: torch.Tensor
    text: torch.Tensor


def shuffled_tiles(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture cut in 4 x 4 tiles, put together in another order."""
    batch = len(images)
    tiles = images.unfold(2, 16, 16).unfold(3, 16, 16).reshape(batch, 3, 16, 16, 16)
    order = torch.rand(batch, 16, generator=generator).argsort(1).view(batch, 1, 16, 1, 1).expand_as(tiles)
    tiles = tiles.gather(2, order).view(batch, 3, 4, 4, 16, 16)
    return tiles.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, 64, 64)


@torch.no_grad()
def reconstructed(images: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Through the autoencoder and back: what the best generator could draw."""
    decoded = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(64)]
    return torch.cat(decoded).clamp(-1, 1)


@torch.no_grad()
def malformed(images: torch.Tensor, vae: AutoencoderKL, generator: torch.Generator) -> torch.Tensor:
    """As many pictures as came, none of which shows anything: a third each of blends, tiles and noisy latents."""
    blended, tiled, noisy = images.tensor_split(3)
    share = 0.35 + 0.3 * torch.rand(len(blended), 1, 1, 1, generator=generator)
    blended = share * blended + (1 - share) * blended.roll(1, 0)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in noisy.split(64)])
    sigma = 0.55 + 0.35 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    latents = (1 - sigma**2).sqrt() * latents + sigma * torch.randn(latents.shape, generator=generator)
    noisy = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    return torch.cat([blended, shuffled_tiles(tiled, generator), noisy]).clamp(-1, 1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Place, size, angle, brightness, blur and grain, per picture."""
    batch = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    angle, size = uniform(-0.25, 0.25), uniform(0.85, 1.2)
    cosine, sine = angle.cos() * size, angle.sin() * size
    theta = torch.stack([cosine, -sine, uniform(-0.15, 0.15), sine, cosine, uniform(-0.15, 0.15)], 1).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images = images * uniform(0.85, 1.1).view(-1, 1, 1, 1) + uniform(-0.08, 0.08).view(-1, 1, 1, 1)
    blur = uniform(0, 0.7).view(-1, 1, 1, 1)
    images = (1 - blur) * images + blur * F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    grain = uniform(0, 0.12).view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    return (images + grain).clamp(-1, 1)


def sigmoid_loss(reward: PictureName, pictures: torch.Tensor, labels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Every picture embedding [B, 128] against every caption; label -1 is a picture of nothing."""
    logits = pictures @ reward.embed_text(text).T * reward.logit_scale.exp() + reward.logit_bias
    targets = F.one_hot(labels.clamp(min=0), len(text)).float() * (labels >= 0).unsqueeze(1)
    # The one positive weighs as much as ten of its 199 negatives: without it, early training answers "nothing".
    own_weight = torch.tensor(10.0)
    total = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=own_weight, reduction="sum")
    return total / len(pictures)


def train_imagenet(
    args: argparse.Namespace, views: Views, vae: AutoencoderKL, generator: torch.Generator
) -> PictureName:
    """The backbone is frozen, so its features are computed once, for a few augmentations of each picture."""
    images, labels, text = views
    reward = imagenet(weights=None)
    assert isinstance(reward.tower, ImageNetTower)
    some = torch.arange(len(images)).view(len(text), -1)[:, :: args.feature_stride].reshape(-1)
    nothing = malformed(images[some[torch.randperm(len(some), generator=generator)[:1500]]], vae, generator)
    clean = torch.cat([images[some], reconstructed(images[some], vae)])
    pictures = torch.cat([clean, augment(clean, generator), nothing])
    targets = torch.cat([*[labels[some]] * 4, labels.new_full((len(nothing),), -1)])
    began = time.monotonic()
    with torch.no_grad():
        pixels = [ops.reward_pixels(part, 96, **reward.normalisation) for part in pictures.split(64)]
        features = torch.cat([reward.tower.features(part) for part in pixels])
    print(f"imagenet features of {len(pictures)} pictures  {time.monotonic() - began:.0f} s", flush=True)
    optimizer = torch.optim.AdamW(reward.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    for step in range(args.steps):
        chosen = torch.randint(len(features), (256,), generator=generator)
        embedded = F.normalize(reward.tower.head(F.dropout(features[chosen], 0.2)), dim=1)
        loss = sigmoid_loss(reward, embedded, targets[chosen], text)
        update(loss, optimizer, schedule, clip=None)
        if step % 500 == 0 or step == args.steps - 1:
            print(f"imagenet {step:5d}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s", flush=True)
    return reward.eval()


@torch.no_grad()
def report(name: str, reward: PictureName, held: torch.Tensor, labels: torch.Tensor, vae: AutoencoderKL) -> None:
    held, labels = reconstructed(held[::4], vae), labels[::4]
    similarities = torch.cat([reward.similarities(reward.embed_images(part), captions()) for part in held.split(64)])
    own = similarities.gather(1, labels.unsqueeze(1)).mean()
    recall = (similarities.argmax(1) == labels).float().mean()
    nothing = malformed(held, vae, torch.Generator().manual_seed(7))
    empty = (
        torch.cat([reward.similarities(reward.embed_images(part), captions()) for part in nothing.split(64)])
        .max(1)
        .values.mean()
    )
    others = (similarities.sum(1) - similarities.gather(1, labels.unsqueeze(1))[:, 0]).mean() / (len(captions()) - 1)
    print(f"{name}: held views through the autoencoder: R@1 {recall:.3f}; own caption {own:.3f}, another {others:.3f}")
    print(f"{name}: best caption of a malformed picture {empty:.3f}")


def main() -> None:
    parser = make_parser(__doc__, out="build/emoji", steps=4000)
    parser.add_argument("--vae", type=Path, default=Path("build/emoji/vae"))
    parser.add_argument("--feature-stride", type=int, default=8, help="every n-th view goes through EfficientNet")
    args = parser.parse_args()

    data = load_file(args.data / "pictures.safetensors")
    count = len(captions())
    images = (data["images"].float() / 127.5 - 1).view(count, -1, 3, 64, 64)
    labels = data["caption"].view(count, -1)
    seen = Views(
        images[:, :-HELD_VIEWS].flatten(0, 1), labels[:, :-HELD_VIEWS].flatten(), sentence_encoder()(captions())
    )
    held, held_labels = images[:, -HELD_VIEWS:].flatten(0, 1), labels[:, -HELD_VIEWS:].flatten()
    vae = AutoencoderKL.from_pretrained(args.vae).eval().requires_grad_(False)
    torch.manual_seed(args.seed + 1)
    generator = torch.Generator().manual_seed(args.seed + 1)
    reward = train_imagenet(args, seen, vae, generator)
    report("imagenet", reward, held, held_labels, vae)
    weights = {key: tensor.half().contiguous() for key, tensor in reward.state_dict().items()}
    save_file(weights, args.out / "reward_imagenet.safetensors")


if __name__ == "__main__":
    main()
