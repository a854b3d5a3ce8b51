"""Whole pipelines of the true size at random weights on the CPU: two steps, resumed, exported, drawn, against the plan.

`python -m benchmarks.full_size`, or `make full-size`: for each model a pipeline in bfloat16 is written to a temporary
folder, tensor by tensor. Each part of the way is a process of its own, by the command line that a user has: `plan`,
`train` for a step, `train --resume` for the second, `export`, `sample`. It is LoRA for both roles. The steps' memory is
the most that their process held while they ran; what loading took besides is told apart.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from benchmarks.tables import Table as Shown
from benchmarks.tables import markdown
from benchmarks.timing import provenance
from diffpp_fast.networks.weight_files import DIFFUSERS, TRANSFORMERS
from diffpp_fast.spreadsheet import cells
from diffpp_fast.tensor_files import TensorWriter
from diffpp_fast.terminal import say
from diffpp_fast.training.planning import architectures
from diffpp_fast.training.planning.architectures import KNOWN, on_meta, parameters_of
from diffpp_fast.training.planning.report import PROCESS
from diffpp_fast.training.yaml_files import read_yaml

GIB = 2**30
RESULTS = Path(__file__).parent / "results"
#: By how much the most that the steps hold may differ from the plan.
ALLOWED = 0.15
#: What a whole machine may take, in GiB.
LIMIT = 20.0
PROMPTS = ("a red apple", "a green frog")
#: Of a model: the pipeline's class, what it calls its denoiser, the side of the latents, and how a call is made.
MODELS: Mapping[str, tuple[str, str, int, Mapping[str, Any]]] = {
    "sd15": ("StableDiffusionPipeline", "unet", 32, {"timestep": 625}),
    "pixart": ("PixArtAlphaPipeline", "transformer", 32, {"timestep": 440}),
    "sdxl": ("StableDiffusionXLPipeline", "unet", 32, {"timestep": 399, "input_scale": 1.0}),
}
#: Models whose text encoders are read block by block: T5-XXL takes 9.5 GB.
STREAMED = ("pixart",)
REWARD = """
def redness():
    return lambda images, prompts: images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


class Ran(NamedTuple):
    """The seconds that one part of the way took, and the most bytes that its process held."""

    seconds: float
    peak: int
    output: str


def write_pipeline(folder: Path, model: str) -> int:
    """Write a pipeline at random weights in bfloat16; return its parameters.

    Matrices are normal with the standard deviation 1 / sqrt(inputs), norms are 1, biases 0: what comes out is finite.
    """
    from diffusers import DDPMScheduler

    kind, denoiser, _, _ = MODELS[model]
    known, stored = KNOWN[model], read_yaml(Path(architectures.__file__).with_name("known.yaml"))["models"][model]
    assert known.decoder is not None
    torch.manual_seed(0)
    parts = {denoiser: ["diffusers", stored["denoiser"]["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    count = write_weights(folder / denoiser, on_meta(known.reference), DIFFUSERS)
    count += write_weights(folder / "vae", on_meta(known.decoder), DIFFUSERS)
    for number, (recipe, _) in enumerate(known.text_encoders, 1):
        names = [f"{name}_{number}" if number > 1 else name for name in ("text_encoder", "tokenizer")]
        network = on_meta(recipe)
        count += write_weights(folder / names[0], network, TRANSFORMERS)
        tokenizer = write_tokenizer(folder / names[1], network.config)
        parts |= {names[0]: ["transformers", type(network).__name__], names[1]: ["transformers", tokenizer]}
    DDPMScheduler(**stored["schedule"]).save_pretrained(folder / "scheduler")
    index = {"_class_name": kind, **parts, "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return count


def write_weights(folder: Path, network: Any, stem: str) -> int:
    """Write a network on meta with random weights; return its parameters."""
    folder.mkdir(parents=True)
    if stem == DIFFUSERS:
        network.save_config(folder)
    else:
        network.config.architectures = [type(network).__name__]
        network.config.save_pretrained(folder)
    tied = set(getattr(network, "all_tied_weights_keys", None) or ())
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in tied}
    with TensorWriter(
        folder / f"{stem}.safetensors",
        [(name, _dtype(tensor), tuple(tensor.shape)) for name, tensor in state.items()],
    ) as writer:
        for name, tensor in state.items():
            writer.write(_random(name, tensor))
    return parameters_of(network)


def write_tokenizer(folder: Path, config: Any) -> str:
    """Write a tokenizer of letters with as many tokens as the encoder has; return its class."""
    from transformers import CLIPTokenizer, T5Tokenizer

    letters = string.ascii_lowercase
    if config.model_type == "t5":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((each, -3.0) for each in letters)]
        pieces += [(f"\u2581{number}", -9.0) for number in range(config.vocab_size - 28 - len(pieces))]
        tokenizer: Any = T5Tokenizer(vocab=pieces, extra_ids=0)
    else:
        names = [*letters, *(f"{each}</w>" for each in letters)]
        names += [f"{number}</w>" for number in range(config.vocab_size - 2 - len(names))]
        names += ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = {name: number for number, name in enumerate(names)}
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return type(tokenizer).__name__


def write_config(folder: Path, model: str, *, rank: int, embeddings: Path | None) -> Path:
    """Write the configuration of a run on the pipeline in `folder / "base"`."""
    _, _, side, call = MODELS[model]
    generator = {**call, "lora": {"rank": rank}}
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "reward.py").write_text(REWARD)
    data = {
        "output": str(folder / "run"),
        "device": "cpu",
        "precision": "bfloat16",
        "prompts": {"path": "prompts.txt", **({"embeddings": str(embeddings)} if embeddings else {})},
        "models": {
            "base": "base",
            "generator": generator,
            "fake": {"lora": {"rank": rank}},
            "text_encoder": {"dtype": "bfloat16"},
            **({"text_encoder_2": {"dtype": "bfloat16"}} if len(KNOWN[model].text_encoders) > 1 else {}),
            "latent_shape": [4, side, side],
        },
        "method": {"name": "diff_instruct_pp", "guidance_scale": 2.0, "weighting": "mean_abs"},
        "rewards": {"optimised": {"factory": "reward.py:redness", "scale": 1.0}},
        "optimizers": {role: {"lr": 1e-4, "clip": 1e6} for role in ("generator", "fake")},
        "training": {"steps": 2, "global_batch": 1, "log_every": 1, "checkpoint_every": 1, "baseline_steps": None},
        "logging": {"tensorboard": False},
    }
    file = folder / "align.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def measure(folder: Path, model: str, rank: int) -> dict[str, Any]:
    """Go the whole way on one model; return what it took. Raises RuntimeError where a part of it fails."""
    begun = time.perf_counter()
    parameters = write_pipeline(folder / "base", model)
    row: dict[str, Any] = {"model": model, "parameters": parameters, "rank": rank, "side": 8 * MODELS[model][2]}
    row["write_s"] = time.perf_counter() - begun
    embeddings = None
    if model in STREAMED:
        config = write_config(folder, model, rank=rank, embeddings=None)
        embeddings = folder / "embeddings"
        row |= _told("embed", run("embed", config, "--out", embeddings, "--stream"))
    config = write_config(folder, model, rank=rank, embeddings=embeddings)
    plan = json.loads(run("plan", config, "--json", allowed=(0, 1)).output)
    row["planned"] = plan["memory"]["total"] + PROCESS
    first = steps(config, "training.steps=1")
    second = steps(config, "training.steps=2", resume=True)
    row |= {f"{name}_{key}": part[key] for name, part in (("first", first), ("second", second)) for key in part}
    row |= _told("export", run("export", folder / "run", "--out", folder / "lora", "--no-merge"))
    picture, streamed = folder / "picture.png", ["--stream"] if model in STREAMED else []
    row |= _told("sample", run("sample", "--run", folder / "run", PROMPTS[0], "--out", picture, *streamed))
    row["picture"] = _is_drawn(picture)
    row["measured"] = max(first["peak"], second["peak"])
    row["difference"] = row["measured"] / row["planned"] - 1.0
    return row


def run(command: str, *arguments: object, allowed: Sequence[int] = (0,)) -> Ran:
    """Run a command of diffpp-fast in a process; raises RuntimeError, with what it said, where it fails."""
    line = [sys.executable, "-m", "diffpp_fast", command, *map(str, arguments)]
    return _child(line, allowed)


def steps(config: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """Train in a process of its own: bytes after loading, the most while loading and while training, seconds a step."""
    line = [sys.executable, "-m", "benchmarks.full_size", "--worker", str(config), *overrides]
    ran = _child([*line, *(["--resume"] if resume else [])], (0,))
    facts: dict[str, Any] = json.loads(ran.output.strip().splitlines()[-1])
    return facts


def work(config: str, overrides: Sequence[str], *, resume: bool) -> None:
    """Train as `diffpp-fast train` does, and print what the steps took."""
    from diffpp_fast.training import Trainer, load_config

    trainer = Trainer(load_config(config, overrides), resume="latest" if resume else None)
    loaded, loading = _status("VmRSS"), _status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.perf_counter()
    outcome = trainer.run()
    facts = {"loaded": loaded, "loading": loading, "peak": _status("VmHWM"), "seconds": time.perf_counter() - begun}
    print(json.dumps({**facts, "step": outcome.step}))


def report(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the rows as CSV, and as a table for readers; rows of other models that are there already stay."""
    origin = provenance(torch.device("cpu"))._asdict()
    measured = {row["model"]: {**row, **origin} for row in rows}
    file = out.with_suffix(".csv")
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as opened:
            measured = {row["model"]: row for row in csv.DictReader(opened)} | measured
    ordered = [measured[model] for model in MODELS if model in measured]
    columns = list(dict.fromkeys(name for row in ordered for name in row))
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells(row) for row in ordered)
    head = ["model", "pixels", "planned, GiB", "held in steps, GiB", "difference", "loaded, GiB", "step, s", "commit"]
    body = [
        [
            row["model"],
            str(row["side"]),
            f"{float(row['planned']) / GIB:.2f}",
            f"{float(row['measured']) / GIB:.2f}",
            f"{float(row['difference']):+.0%}",
            f"{max(float(row['first_loading']), float(row['second_loading'])) / GIB:.2f}",
            f"{float(row['second_seconds']):.0f}",
            f"{row['commit']}",
        ]
        for row in ordered
    ]
    said = "LoRA for both roles, bfloat16, one sample; a step with its checkpoint, on a machine with other work."
    out.with_suffix(".md").write_text(f"{said}\n\n{markdown(Shown([head, *body]))}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where memory was not as planned."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("models", nargs="*", help="sd15, pixart, sdxl (all)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (8)")
    parser.add_argument("--out", type=Path, default=RESULTS / "full-size-cpu", help="files, without their ending")
    parser.add_argument("--scratch", type=Path, help="where the pipelines are made (the system's temporary folder)")
    parser.add_argument("--worker", metavar="CONFIG.yaml", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        work(given.worker, given.models, resume=given.resume)
        return 0
    rows = []
    for model in given.models or MODELS:
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            if not _is_room(model, Path(folder)):
                continue
            row = measure(Path(folder), model, given.rank)
        rows.append(row)
        held = f"held {row['measured'] / GIB:.2f} ({row['difference']:+.0%})"
        say(f"{model}: planned {row['planned'] / GIB:.2f} GiB, {held}")
    report(rows, given.out)
    return int(not rows or any(abs(row["difference"]) > ALLOWED or row["measured"] > LIMIT * GIB for row in rows))


def _child(line: Sequence[str], allowed: Sequence[int]) -> Ran:
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(line, stdout=output, stderr=errors, cwd=Path(__file__).parents[1])
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, errors):
            file.seek(0)
        if child.returncode not in allowed:
            raise RuntimeError(f"{' '.join(line)} ended with {child.returncode}:\n{errors.read()[-4000:]}")
        return Ran(time.perf_counter() - begun, usage.ru_maxrss * 1024, output.read())


def _told(name: str, ran: Ran) -> dict[str, Any]:
    return {f"{name}_s": ran.seconds, f"{name}_peak": ran.peak}


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")))


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.is_floating_point() else tensor.dtype


def _random(name: str, tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return torch.arange(tensor.numel(), dtype=tensor.dtype).reshape(shape)
    if tensor.dim() < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16).normal_()
    return made.mul_(torch.Size(shape[1:]).numel() ** -0.5)


def _is_room(model: str, folder: Path) -> bool:
    """Whether memory and disk suffice; says so where they don't."""
    known = KNOWN[model]
    recipes = [known.reference, *(recipe for recipe, _ in known.text_encoders)]
    sizes = [parameters_of(on_meta(recipe)) for recipe in recipes]
    with open("/proc/meminfo") as file:
        free = 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    # The weights, without encoders that are streamed, and what a step takes with its process.
    resident = sizes[0] if model in STREAMED else sum(sizes)
    memory = 2 * resident + 3 * GIB
    # The pipeline, and the generator that the run exports in float32.
    disk = 2 * sum(sizes) + 4 * sizes[0] + GIB
    if memory > free or disk > shutil.disk_usage(folder).free:
        say(f"{model} is left out: it takes {memory / GIB:.1f} GiB of memory and {disk / GIB:.1f} GiB of disk")
        return False
    return True


def _is_drawn(path: Path) -> bool:
    """Whether a picture is there that is not of one colour."""
    from PIL import Image

    with Image.open(path) as picture:
        extrema: Any = picture.convert("RGB").getextrema()
        return any(low != high for low, high in extrema)


if __name__ == "__main__":
    sys.exit(main())
