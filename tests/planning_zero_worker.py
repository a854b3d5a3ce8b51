"""A process of two: sums up what DeepSpeed's optimizers hold of a tiny UNet, in stages 1, 2 and 3, and prints it.

Started by tests/test_planning.py; the configuration is that of the project's engines.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import deepspeed
import tiny
import torch
import torch.distributed as dist
from torch import nn

from diffpp_fast.training.distributed import leave

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

BUCKET = 4096


def main() -> None:
    dist.init_process_group("gloo")
    network = tiny.unet()
    sizes = {stage: held(copy.deepcopy(network), stage) for stage in (1, 2, 3)}
    if dist.get_rank() == 0:
        print("SIZES", json.dumps(sizes))
    dist.destroy_process_group()


def held(network: Any, stage: int) -> dict[str, int]:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "overlap_comm": False},
    }
    if stage == 3:
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    client = torch.optim.AdamW(network.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=network, optimizer=client, config=settings, dist_init_required=False)
    optimizer: Any = engine.optimizer
    x, t = torch.zeros(1, *tiny.LATENT, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    text = torch.zeros(1, 8, tiny.TEXT_WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = engine(x, t, text, return_dict=False)[0]
    engine.backward(prediction.float().square().mean())
    gradients = {
        1: lambda: optimizer.fp32_groups_gradients_flat,
        2: lambda: [group.flat_partition for group in optimizer.averaged_gradients.values()],
        3: lambda: [optimizer.grad_partitions_flat_buffer],
    }[stage]()
    size = {"gradients": total(gradients)}
    engine.step()
    low = {
        1: lambda: optimizer.bf16_groups_flat,
        2: lambda: optimizer.bit16_groups_flat,
        3: lambda: [optimizer.lp_param_buffer],
    }[stage]()
    (group,) = client.param_groups
    states = [tensor for state in client.state.values() for tensor in state.values()]
    return size | {"weights": total(low), "master": total(group["params"] if stage < 3 else masters(optimizer)),
                   "optimizer": total(states)}  # fmt: skip


def masters(optimizer: Any) -> list[torch.Tensor]:
    return list(optimizer.fp32_partitioned_groups_flat)


def total(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor | nn.Parameter))


if __name__ == "__main__":
    main()
    leave(0)
