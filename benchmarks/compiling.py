"""`python -m benchmarks.compiling regional`: what torch.compile takes before a first step, whole or by blocks.

A UNet with the blocks of Stable Diffusion XL's, a tenth as wide, forward and backward, and then forward alone, as
generator and reference are called. Set TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, else a second run measures the cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from itertools import pairwise

import torch

from diffpp_fast.networks import Denoiser, fuse
from diffpp_fast.training.build.compiling import compile_network

ROUNDS = 7


def spent() -> float:
    """Seconds that this process and its ended children have computed."""
    return sum(os.times()[:4])


def main() -> None:
    from diffusers import UNet2DConditionModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("eager", "regional", "whole"))
    mode = parser.parse_args().mode
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        norm_num_groups=8,
    ).eval()
    fuse(network)
    modules = 0 if mode == "eager" else compile_network(network, mode)
    denoise = Denoiser(network)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.zeros(1, 6)}
    conditioning = {"encoder_hidden_states": torch.randn(1, 77, 64), "added_cond_kwargs": added}
    x, t = torch.randn(1, 4, 16, 16), torch.full((1,), 500)

    def step() -> float:
        begun = time.process_time()
        denoise(x, t, conditioning).square().mean().backward()
        network.zero_grad()
        return time.process_time() - begun

    times = [spent()]
    step()
    times.append(spent())
    with torch.no_grad():
        denoise(x, t, conditioning)
    times.append(spent())
    later = statistics.median(step() for _ in range(ROUNDS))
    graphs = 0 if mode == "eager" else torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first = " + ".join(f"{end - begin:.1f} s" for begin, end in pairwise(times))
    print(f"{mode}: {modules} modules, {graphs} graphs; first calls {first}; later steps {later:.3f} s")


if __name__ == "__main__":
    main()
