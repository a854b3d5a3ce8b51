"""Everything that was trained, as float16 safetensors in examples/emoji/weights: what `make demo` starts from.

    python examples/emoji/export_weights.py --build build/emoji --generator runs/emoji-distil/generator

Networks are written in diffusers' format. The name reward is written as it is, and train_judges.py writes the judges
itself; the backbone of `imagenet` and the text encoder stay in their own packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/emoji"))
    parser.add_argument("--generator", type=Path, default=Path("runs/emoji-distil/generator"))
    parser.add_argument("--out", type=Path, default=HERE / "weights")
    args = parser.parse_args()

    networks = {
        "vae": (AutoencoderKL, args.build / "vae"),
        "reference": (UNet2DConditionModel, args.build / "reference"),
        "generator": (UNet2DConditionModel, args.generator),
    }
    for name, (network_class, folder) in networks.items():
        if not folder.is_dir():
            print(f"left out: {name}, there is no {folder}")
            continue
        network = network_class.from_pretrained(folder, torch_dtype=torch.float16, low_cpu_mem_usage=False)
        network.save_pretrained(args.out / name)
        config = args.out / name / "config.json"
        facts = json.loads(config.read_text(encoding="utf-8"))
        facts.pop("_name_or_path", None)  # a folder of the machine that trained it
        config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(args.build / "scheduler", args.out / "scheduler", dirs_exist_ok=True)
    shutil.copy(args.build / "reward_imagenet.safetensors", args.out)
    sizes = {path: path.stat().st_size for path in sorted(args.out.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size:10,d}  {path}")
    print(f"{sum(sizes.values()):10,d}  in all")


if __name__ == "__main__":
    main()
