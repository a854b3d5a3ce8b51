"""Both preference judges, from pairs of pictures by Bradley and Terry's model.

    python examples/emoji/train_judges.py --data build/emoji

Of every pair one picture is known to be better for its prompt: a rendering against one with a fault, a smaller degree
of a fault against a larger one, a rendering against a sample of the shipped generator, a picture of the prompt
against one of another prompt. Every second rendering has gone through the autoencoder: no judge goes by its traces.
The held-out judge also compares one-step guesses of the reference from little noise with those from much, blends of a
view with such a guess, and samples with themselves a little softer. The two judges see other views, other samples and
the kinds of fault in other forms (pairs.py). Four views of each caption are kept for the figures printed at the end.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import fastest_precision, make_parser, update
from diffusers import AutoencoderKL, DDIMScheduler
from evaluation import generator_images
from pairs import FAULTS, OTHER_FAULTS, Fault, apply_fault, per_picture, two_degrees, uniform
from preference import AutoencoderFeatures, Head, ImageNetFeatures, Judge, Member, autoencoder_judge, imagenet_judge
from rewards import HERE, captions, sentence_encoder
from safetensors.torch import load_file, save_file

from diffpp_fast import Noise, NoiseSchedule, ops
from diffpp_fast.networks import load_denoiser
from diffpp_fast.training import load_config
from diffpp_fast.training.build import Sampler, build_sampler
from diffpp_fast.training.grids import decode

#: Views of each caption: of the one held out, of the judge to optimise, of the figures.
SECOND_VIEWS, JUDGE_VIEWS, HELD_VIEWS = slice(0, 6), slice(32, 36), slice(56, 60)
#: Noise levels of the guesses.
TIMES = (300, 500, 700, 850)
#: Seeds of the generator's samples. Evaluation has another one.
SECOND_SAMPLES, JUDGE_SAMPLES, HELD_SAMPLES = 101, 202, 303
#: Weight of the scores' square: it keeps them from growing where pairs are told apart without doubt.
SHRINK = 2e-3


class Pools(NamedTuple):
    """Pictures [200, n, 3, 64, 64] uint8 by caption; `clean` are the renderings `raw` through the autoencoder.

    Guesses have [200, n, levels, ...], of the same views as `clean`.
    """

    clean: torch.Tensor
    raw: torch.Tensor
    samples: torch.Tensor
    guesses: torch.Tensor | None = None


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: torch.Tensor, precision: str) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        parts = [to_images(part).to(memory_format=torch.channels_last) for part in images.split(100)]
        return torch.cat([vae.encode(part).latent_dist.mean.float() for part in parts])


@torch.no_grad()
def guessed(sampler: Sampler, latents: torch.Tensor, time_step: int, seed: int) -> torch.Tensor:
    """Noise [200, n, 4, 16, 16] up to a time and return what the reference takes for the picture behind it."""
    reference = load_denoiser(str(HERE / "weights" / "reference")).eval()
    schedule = NoiseSchedule.from_diffusers(DDIMScheduler.from_pretrained(HERE / "weights" / "scheduler"))
    alpha, sigma = schedule.coefficients(torch.tensor([time_step]))
    found = []
    for number, view in enumerate(latents.unbind(1)):
        samples = torch.arange(len(view)) + number * len(view)
        x_t = alpha * view + sigma * Noise(seed, samples, stream=1).normal(view.shape[1:])
        velocity = reference(x_t, torch.full((len(view),), time_step), sampler.encode(captions()))
        found.append(alpha * x_t - sigma * velocity)
    return torch.stack(found, 1)


def make_samples(sampler: Sampler, count: int, seed: int) -> torch.Tensor:
    """Return `count` pictures of the sampler for every caption: [200, count, 3, 64, 64]."""
    parts = [generator_images(sampler, captions(), first=200 * number, seed=seed) for number in range(count)]
    return torch.stack([to_bytes(part) for part in parts], 1)


def make_pools(
    raw: torch.Tensor, latents: torch.Tensor, sampler: Sampler, *, seed: int, samples: int, guess_views: int
) -> Pools:
    """Decode latents [200, n, 4, 16, 16] of views, guesses of the first of them, and the sampler's pictures."""

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        return to_bytes(decode(sampler, latents.flatten(0, 1), batch=50)).unflatten(0, latents.shape[:2])

    clean, guesses = decoded(latents), None
    if guess_views:
        levels = [guessed(sampler, latents[:, :guess_views], level, seed) for level in TIMES]
        guesses = torch.stack([decoded(level) for level in levels], 2)
    return Pools(clean, raw, make_samples(sampler, samples, seed), guesses)


class Pairs(NamedTuple):
    """Two pictures [B, 3, 64, 64] for each of B captions; the first is the better one."""

    captions: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor


def pick(pool: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one picture of each label."""
    return to_images(pool[labels, torch.randint(pool.shape[1], labels.shape, generator=generator)])


def pick_rendering(pools: Pools, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one rendering of each label, every second one through the autoencoder."""
    through = torch.rand(len(labels), 1, 1, 1, generator=generator) < 0.5
    return torch.where(through, pick(pools.clean, labels, generator), pick(pools.raw, labels, generator))


def other_labels(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = len(captions())
    return (labels + torch.randint(1, count, labels.shape, generator=generator)) % count


def draw_labels(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(len(captions()), (batch,), generator=generator)


def faulty_pairs(pools: Pools, faults: dict[str, Fault], batch: int, generator: torch.Generator) -> Pairs:
    """Two degrees of one fault, the smaller often none: of renderings and, one in three, of the generator's samples."""
    labels = draw_labels(batch, generator)
    of_sample = torch.rand(batch, 1, 1, 1, generator=generator) < 1 / 3
    images = pick_rendering(pools, labels, generator)
    images = torch.where(of_sample, pick(pools.samples, labels, generator), images)
    better, worse = [], []
    for part in images.chunk(4):
        fault = list(faults.values())[int(torch.randint(len(faults), (), generator=generator))]
        low, high = apply_fault(fault, part, two_degrees(len(part), generator), generator)
        better.append(low)
        worse.append(high)
    return Pairs(labels, torch.cat(better), torch.cat(worse))


def guess_pairs(pools: Pools, batch: int, generator: torch.Generator) -> Pairs:
    """A view, or a guess from less noise, against a guess from more noise."""
    assert pools.guesses is not None
    labels = draw_labels(batch, generator)
    views = torch.randint(pools.guesses.shape[1], labels.shape, generator=generator)
    levels = torch.rand(batch, len(TIMES) + 1, generator=generator).argsort(1)[:, :2].sort(1).values
    ladder = torch.cat([pools.clean[labels, views].unsqueeze(1), pools.guesses[labels, views]], 1)
    better, worse = ladder[torch.arange(batch), levels[:, 0]], ladder[torch.arange(batch), levels[:, 1]]
    return Pairs(labels, to_images(better), to_images(worse))


def sample_pairs(pools: Pools, batch: int, generator: torch.Generator) -> Pairs:
    """A rendering against a sample of the generator."""
    labels = draw_labels(batch, generator)
    return Pairs(labels, pick_rendering(pools, labels, generator), pick(pools.samples, labels, generator))


def prompt_pairs(pools: Pools, batch: int, generator: torch.Generator) -> Pairs:
    """A picture of the prompt against one of another prompt, both renderings or both samples."""
    labels = draw_labels(batch, generator)
    others = other_labels(labels, generator)
    parts = [
        (pick(pool, labels[part], generator), pick(pool, others[part], generator))
        for pool, part in ((pools.clean, slice(0, batch // 2)), (pools.samples, slice(batch // 2, None)))
    ]
    return Pairs(labels, *(torch.cat(side) for side in zip(*parts, strict=True)))


def blended_pairs(pools: Pools, batch: int, generator: torch.Generator) -> Pairs:
    """Two blends of a view with the guess of it from noise: that with less of the guess is the better one."""
    assert pools.guesses is not None
    labels = draw_labels(batch, generator)
    views = torch.randint(pools.guesses.shape[1], labels.shape, generator=generator)
    levels = torch.randint(1, len(TIMES), labels.shape, generator=generator)
    view, guess = to_images(pools.clean[labels, views]), to_images(pools.guesses[labels, views, levels])
    low = uniform(batch, -0.3, 0.7, generator).clamp(min=0)
    high = low + 0.25 + (0.75 - low) * torch.rand(batch, generator=generator)
    return Pairs(labels, *(torch.lerp(view, guess, per_picture(share)) for share in (low, high)))


def softened_pairs(pools: Pools, batch: int, generator: torch.Generator) -> Pairs:
    """A sample of the generator against itself, a little softer: by a Gaussian, along a line, or by half the size."""
    labels = draw_labels(batch, generator)
    image = pick(pools.samples, labels, generator)
    degree = uniform(batch, 0.08, 0.3, generator)
    softer = [FAULTS[name](image, [degree], generator)[0] for name in ("blurred", "streaked")]
    chosen = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    return Pairs(labels, image, torch.where(chosen, *softer))


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every picture moved by up to 4 pixels and perhaps mirrored, in eight groups, both pictures of a pair alike."""
    parts = []
    for part in images.chunk(8, dim=1):
        down, right = (int(way) for way in torch.randint(-4, 5, (2,), generator=generator))
        padded = F.pad(part.flatten(0, 1), (4, 4, 4, 4), value=1.0)
        part = padded[..., 4 + down : 68 + down, 4 + right : 68 + right].unflatten(0, part.shape[:2])
        parts.append(part.flip(4) if torch.rand((), generator=generator) < 0.5 else part)
    return torch.cat(parts, 1)


def loss_of(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Bradley and Terry's likelihood of the pairs, with a little shrinkage."""
    return F.softplus(worse - better).mean() + SHRINK * (better.square() + worse.square()).mean()


def prompt_loss(head: Head, features: torch.Tensor, sentences: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compare for every prompt of a batch its own picture with all pictures of other prompts: features [B, F]."""
    scores = head(features.unsqueeze(0), sentences[labels].unsqueeze(1))  # [prompts, pictures]
    other = labels.unsqueeze(0) != labels.unsqueeze(1)
    return F.softplus(scores - scores.diagonal().unsqueeze(1))[other].mean()


#: Pairs of each kind that the held-out judge learns from.
SECOND_PAIRS = {faulty_pairs: 5000, sample_pairs: 2500, softened_pairs: 1500, blended_pairs: 1500, guess_pairs: 1500}


@torch.no_grad()
def pair_features(member: Member, pools: Pools, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and features [2, pairs, 1408] of SECOND_PAIRS, each pair moved and perhaps mirrored."""
    labels, features = [], []
    for draw, count in SECOND_PAIRS.items():
        for _ in range(0, count, 100):
            pairs = draw(pools, *((FAULTS,) if draw is faulty_pairs else ()), 100, generator)
            images = shifted(torch.stack([pairs.better, pairs.worse]), generator).flatten(0, 1)
            pixels = ops.reward_pixels(images, member.sizes[0], **member.normalisation)
            labels.append(pairs.captions)
            features.append(member.tower.raw(pixels).unflatten(0, (2, -1)).half())
    return torch.cat(labels), torch.cat(features, 1)


def train_autoencoder_head(args: argparse.Namespace, pools: Pools, generator: torch.Generator) -> Judge:
    """The encoder is frozen: its features of all pairs are computed once."""
    judge = autoencoder_judge()
    member = judge.members[0]
    tower: AutoencoderFeatures = member.tower
    began = time.monotonic()
    labels, pairs = pair_features(member, pools, generator)
    everything = pairs.flatten(0, 1).float()
    tower.mean.copy_(everything.mean(0))
    tower.deviation.copy_(everything.std(0) + 1e-3)
    print(f"features of {len(everything)} pictures  {time.monotonic() - began:.0f} s", flush=True)

    sentences = sentence_encoder()(captions())
    generator.manual_seed(args.seed)
    optimizer = torch.optim.AdamW(member.head.parameters(), lr=1e-3, weight_decay=3e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps)
    right = 0.0
    for step in range(args.steps):
        row = torch.randint(len(labels), (256,), generator=generator)
        features = F.dropout((pairs[:, row].float() - tower.mean) / tower.deviation, 0.2)
        scores = member.head(features, sentences[labels[row]])
        # Every picture of the first 48 is a wrong one for the others' prompts.
        loss = loss_of(*scores) + 0.5 * prompt_loss(member.head, features[0, :48], sentences, labels[row[:48]])
        update(loss, optimizer, schedule)
        right += ((scores[0] > scores[1]).float().mean().item() - right) * 0.02
        if step % 500 == 0 or step == args.steps - 1:
            print(f"second judge {step:5d}  right {right:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    return judge.eval()


def train_imagenet(args: argparse.Namespace, pools: Pools, generator: torch.Generator) -> Judge:
    """The backbone is frozen: its features of all pictures and of their faulty versions are computed once."""
    judge = imagenet_judge()
    member = judge.members[0]
    tower: ImageNetFeatures = member.tower
    began = time.monotonic()

    @torch.no_grad()
    def raw(images: torch.Tensor) -> torch.Tensor:
        """[..., 3, 64, 64] -> half-precision features [..., 1632]."""
        flat = images.flatten(0, -4)
        parts = [
            tower.raw(ops.reward_pixels(part, member.sizes[0], **member.normalisation)).half()
            for part in flat.split(100)
        ]
        return torch.cat(parts).unflatten(0, images.shape[:-3])

    clean = raw(to_images(torch.cat([pools.clean, pools.raw], 1)))
    samples = raw(to_images(pools.samples))
    # What faults are made of: some views with and without the autoencoder, and samples.
    some = slice(0, args.feature_views)
    views = torch.cat([pools.clean[:, some], pools.raw[:, some], pools.samples[:, some]], 1)
    spotless = raw(to_images(views))
    ladders = []
    for fault in OTHER_FAULTS.values():
        # Three degrees of every fault for every view.
        rungs = []
        for part in to_images(views.flatten(0, 1)).split(200):
            low = 0.1 + 0.2 * torch.rand(len(part), generator=generator)
            step = 0.15 + 0.15 * torch.rand(len(part), generator=generator)
            rungs.append(torch.stack(apply_fault(fault, part, [low, low + step, low + 2 * step], generator), 1))
        ladders.append(raw(torch.cat(rungs)).unflatten(0, views.shape[:2]))
    faulty = torch.stack(ladders, 2)  # [200, views, faults, 3, 1632]
    tower.mean.copy_(torch.cat([clean.flatten(0, 1), samples.flatten(0, 1)]).float().mean(0))
    tower.deviation.copy_(torch.cat([clean.flatten(0, 1), samples.flatten(0, 1)]).float().std(0) + 1e-3)
    print(f"features of {faulty.numel() // faulty.shape[-1]} pictures  {time.monotonic() - began:.0f} s", flush=True)

    sentences = sentence_encoder()(captions())
    optimizer = torch.optim.AdamW(member.head.parameters(), lr=1e-3, weight_decay=3e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps)
    right = 0.0
    for step in range(args.steps):
        labels = draw_labels(256, generator)
        others = other_labels(labels, generator)
        view, other_view = torch.randint(clean.shape[1], (2, 256), generator=generator)
        sample, other_sample = torch.randint(samples.shape[1], (2, 256), generator=generator)
        kind = torch.randint(faulty.shape[2], (256,), generator=generator)
        origin = torch.randint(views.shape[1], (256,), generator=generator)
        ladder = torch.cat([spotless[labels, origin].unsqueeze(1), faulty[labels, origin, kind]], 1)
        rung = torch.rand(256, 4, generator=generator).argsort(1)[:, :2].sort(1).values
        row = torch.arange(256)
        faults = torch.arange(256) < 112
        wrong = torch.arange(256) >= 192
        of_samples = wrong & (row % 2 == 0)
        better = clean[labels, other_view]
        better[faults] = ladder[row, rung[:, 0]][faults]
        better[of_samples] = samples[labels, sample][of_samples]
        worse = samples[labels, sample]
        worse[faults] = ladder[row, rung[:, 1]][faults]
        worse[wrong] = clean[others, view][wrong]
        worse[of_samples] = samples[others, other_sample][of_samples]
        features = (torch.stack([better, worse]).float() - tower.mean) / tower.deviation
        scores = torch.stack([member.head(F.dropout(side, 0.2), sentences[labels]) for side in features])
        update(loss_of(*scores), optimizer, schedule)
        right += ((scores[0] > scores[1]).float().mean().item() - right) * 0.02
        if step % 500 == 0 or step == args.steps - 1:
            print(f"judge {step:5d}  right {right:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    return judge.eval()


@torch.no_grad()
def scores_of(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    names = [captions()[label] for label in labels.tolist()]
    parts = [
        judge.by_member(part, names[start : start + 100])
        for start, part in zip(range(0, len(names), 100), images.split(100), strict=True)
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
def standardise(judge: Judge, samples: torch.Tensor) -> None:
    """Bring every member's scores of the shipped generator's samples [200, n, ...] to mean 0 and deviation 1."""
    labels = torch.arange(len(samples)).repeat_interleave(samples.shape[1])
    scores = scores_of(judge, to_images(samples.flatten(0, 1)), labels)
    judge.offset.copy_(scores.mean(1))
    judge.unit.copy_(scores.std(1))


def report(name: str, judge: Judge, held: Pools, generator: torch.Generator) -> None:
    """Print how often the judge is right about pairs that no training saw, by kind."""
    kinds = {
        fault: faulty_pairs(held, {fault: apply}, 200, generator) for fault, apply in (FAULTS | OTHER_FAULTS).items()
    }
    kinds |= {"sample": sample_pairs(held, 400, generator), "prompt": prompt_pairs(held, 400, generator)}
    kinds |= {"guess": guess_pairs(held, 400, generator), "blended": blended_pairs(held, 400, generator)}
    kinds["softened"] = softened_pairs(held, 400, generator)
    for kind, pairs in kinds.items():
        better, worse = (scores_of(judge, side, pairs.captions).mean(0) for side in (pairs.better, pairs.worse))
        print(f"{name}: {kind:12s} right {(better > worse).float().mean():.3f}  gap {(better - worse).mean():.2f}")


def main() -> None:
    parser = make_parser(__doc__, out="examples/emoji/weights", steps=3000)
    parser.add_argument("--feature-views", type=int, default=1)
    parser.add_argument("--only", choices=("judge", "second_judge"))
    args = parser.parse_args()

    data = load_file(args.data / "pictures.safetensors")
    images = data["images"].unflatten(0, (len(captions()), -1))
    vae = (
        AutoencoderKL.from_pretrained(HERE / "weights" / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    )
    vae = vae.to(memory_format=torch.channels_last)
    precision = fastest_precision()
    before = build_sampler(load_config(HERE / "align.yaml", [f"precision={precision}"]), torch.device("cpu"))
    began = time.monotonic()

    def pools_of(views: slice, seed: int, samples: int, guess_views: int) -> Pools:
        some = images[:, views]
        latents = encoded(vae, some.flatten(0, 1), precision).unflatten(0, some.shape[:2])
        return make_pools(some, latents, before, seed=seed, samples=samples, guess_views=guess_views)

    held = pools_of(HELD_VIEWS, HELD_SAMPLES, 2, 1)
    recipes = {
        "judge": (JUDGE_VIEWS, JUDGE_SAMPLES, train_imagenet, 4, 0),
        "second_judge": (SECOND_VIEWS, SECOND_SAMPLES, train_autoencoder_head, 8, 3),
    }
    for number, (name, (views, seed, train, samples, guess_views)) in enumerate(recipes.items()):
        if args.only not in (None, name):
            continue
        generator = torch.Generator().manual_seed(args.seed + number)
        pools = pools_of(views, seed, samples, guess_views)
        print(f"pictures  {time.monotonic() - began:.0f} s", flush=True)
        torch.manual_seed(args.seed + number)
        judge = train(args, pools, generator)
        standardise(judge, held.samples)
        report(name, judge, held, torch.Generator().manual_seed(7))
        weights = {key: tensor.half().contiguous() for key, tensor in judge.state_dict().items()}
        save_file(weights, args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
