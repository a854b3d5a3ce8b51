"""LoRA files as the beginning of a role: read back from every format, merged or kept, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_lora_formats import NETWORKS, SD15, changes_of, updates_of, write
from torch import Tensor, nn

from diffpp_fast.cli.main import main
from diffpp_fast.networks.lora_files import LoraFile, Merged, endings, modules_of, read_lora
from diffpp_fast.networks.lora_formats import FORMATS, LoraFormat, LoraTarget, LowRank, write_lora
from diffpp_fast.networks.low_rank import joined
from diffpp_fast.training import CheckpointError, Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.checkpoint import read_role
from diffpp_fast.training.config import Lora
from diffpp_fast.training.export import find_weights
from diffpp_fast.training.loading import dump_config
from diffpp_fast.training.state import read_record

CPU = torch.device("cpu")
TARGETS = "[to_q, to_out.0, conv1, proj_in, time_emb_proj]"


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def read(file: Path, network: Any, alpha: float | None = None) -> LoraFile:
    config = {"_class_name": type(network).__name__, **network.config}
    return read_lora(str(file), config, shapes_of(network), alpha)


def assert_changes(found: Mapping[str, LowRank], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for layer, update in found.items():
        change = update.alpha / update.rank * update.up.float().flatten(1) @ update.down.float().flatten(1)
        torch.testing.assert_close(change, expected[layer].flatten(1), rtol=1e-4, atol=1e-5, msg=layer)


SLOW_SDXL = ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", [*SLOW_SDXL, "pixart"])
def test_what_was_written_is_read_back(family: str, kind: LoraFormat, tmp_path: Path) -> None:
    if (family, kind) == ("pixart", "kohya"):
        return
    network = NETWORKS[family]()
    written = updates_of(network, kind)
    found = read(write(tmp_path, kind, network), network)
    assert_changes(found.layers, changes_of(network, written))
    for layer, update in found.layers.items():
        assert torch.equal(update.down, written[layer].down)


def test_the_halves_of_each_layer_are_the_bits_that_were_written(tmp_path: Path) -> None:
    """Layers of one alpha, in half precision, where diffusers' format multiplies B by a power of two."""
    network = NETWORKS["sd15"]()
    written = {
        layer: LowRank(update.down.bfloat16(), update.up.bfloat16(), 2.0 * update.rank)
        for layer, update in updates_of(network, "kohya").items()
        if update.rank == 2
    }
    for kind in FORMATS:
        (tmp_path / kind).mkdir()
        write_lora(tmp_path / kind, kind, written, LoraTarget.of(network), prediction_type="epsilon", name="lora")
        rank, alpha, layers = read(tmp_path / kind, network).uniform()
        factor = 2.0 if kind == "diffusers" else 1.0
        assert (rank, alpha) == (2, 4.0 / factor) and layers.keys() == written.keys()
        for layer, update in layers.items():
            assert torch.equal(update.down, written[layer].down)
            assert torch.equal(update.up, factor * written[layer].up) and update.up.dtype == torch.bfloat16


@pytest.mark.parametrize("family", SLOW_SDXL)
def test_a_file_like_lcm_loras_is_what_diffusers_loads(family: str, tmp_path: Path) -> None:
    """kohya's names with diffusers' layers, in half precision, with alpha in every layer: the same, as its converter
    finds no other alpha for layers of attention."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    network = NETWORKS[family]()
    tensors = {}
    for layer, update in updates_of(network, "kohya").items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = update.down.half()
        tensors[f"{name}.lora_up.weight"] = update.up.half()
        tensors[f"{name}.alpha"] = torch.tensor(1.5, dtype=torch.float16)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    found = read(tmp_path, network)
    loader: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    state, alphas = loader.lora_state_dict(tmp_path, weight_name=file.name)
    network.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    network.fuse_lora()
    network.unload_lora()
    merged, loaded = Merged(before, found.layers, 1.0), network.state_dict()
    assert len(merged.changed) > 200
    for name in before:
        torch.testing.assert_close(merged[name], loaded[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 5}, "lora_alpha": 3}])
def test_adapters_of_peft_are_what_peft_merges(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    network = tiny.pixart()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    settings = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "linear_1"]} | options)
    model = get_peft_model(network, settings)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    found = read(tmp_path, tiny.pixart())
    merged = model.merge_and_unload().state_dict()
    ours = Merged(before, found.layers, 1.0)
    assert len(ours.changed) > 4
    for name in before:
        torch.testing.assert_close(ours[name], merged[name], msg=name)


def test_names_of_diffusers_before_peft(tmp_path: Path) -> None:
    """Attention processors had the factors then; pickled, as such files were."""
    network = tiny.unet()
    layers = [name.removesuffix(".weight") for name in shapes_of(network) if ".to_q." in name or ".to_out." in name]
    layers = [layer for layer in layers if not layer.endswith("bias")]
    tensors, changes = {}, {}
    torch.manual_seed(0)
    for layer in layers:
        block, _, part = layer.removesuffix(".0").rpartition(".")
        shape = shapes_of(network)[f"{layer}.weight"]
        down, up = torch.randn(3, shape[1]), torch.randn(shape[0], 3)
        tensors[f"unet.{block}.processor.{part}_lora.down.weight"] = down
        tensors[f"unet.{block}.processor.{part}_lora.up.weight"] = up
        changes[layer] = up @ down
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    assert_changes(read(tmp_path / "pytorch_lora_weights.bin", network).layers, changes)


def test_text_encoders_are_left_out_and_counted(tmp_path: Path) -> None:
    network = tiny.unet()
    file = write(tmp_path, "comfyui", network)
    more = {
        f"{name}.lora_{end}.weight": torch.ones(2, 2)
        for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1")
        for end in ("down", "up")
    }
    save_file(load_file(file) | more, file)
    found = read(file, network)
    assert found.text == 4 and found.layers.keys() == updates_of(network, "comfyui").keys()
    save_file(more, file)
    with pytest.raises(ValueError, match="only 4 tensors of text encoders"):
        read(file, network)


Edit = Callable[[dict[str, Tensor]], Any]
FIRST = "lora_unet_conv_in"


def rename(old: str, new: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def to_float8(tensors: dict[str, Tensor]) -> Tensor:
    tensors[f"{FIRST}.lora_up.weight"] = tensors[f"{FIRST}.lora_up.weight"].to(torch.float8_e4m3fn)
    return tensors[f"{FIRST}.lora_up.weight"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.pop(f"{FIRST}.alpha"), r"says no alpha.*conv_in has none.*key alpha"),
        (lambda d: d.pop(f"{FIRST}.lora_up.weight"), "not whole: conv_in lacks A or B"),
        (lambda d: d.update({f"{FIRST}.dora_scale": torch.ones(8)}), "it is DoRA.*only LoRA is read"),
        (lambda d: d.update({f"{FIRST}.hada_w1_a": torch.ones(8)}), "it is LoHa"),
        (lambda d: d.update({f"{FIRST}.lokr_w1": torch.ones(8)}), "it is LoKr"),
        (lambda d: d.update({f"{FIRST}.lora_mid.weight": torch.ones(8)}), "it is LoCon with a core"),
        (lambda d: d.update({f"{FIRST}.diff_b": torch.ones(8)}), "whole differences"),
        (lambda d: d.update({f"{FIRST}.alpha": torch.tensor(0.0)}), "alpha of conv_in is 0"),
        (lambda d: d[f"{FIRST}.lora_up.weight"].fill_(torch.nan), "NaN or infinite"),
        (
            lambda d: d.update({f"{FIRST}.alpha": torch.ones(2)}),
            r"conv_in.alpha has the shape \[2\], and alpha is a",
        ),
        (lambda d: d.update({f"{FIRST}.lora_up.weight": torch.tensor(1.0)}), "another network: conv_in has factors"),
        (lambda d: d.update({f"{FIRST}.lora_down.weight": torch.tensor(1.0)}), "factors of conv_in are empty"),
        (lambda d: d.update({f"{FIRST}.lora_down.weight": torch.ones(0, 4, 3, 3)}), "conv_in are empty: its rank is 0"),
        (
            lambda d: d.update({f"{FIRST}.lora_up.weight": torch.ones(8, 2, dtype=torch.int8)}),
            "float32 and int8",
        ),
        (lambda d: d.update({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}), "two updates of conv_in"),
        (lambda d: to_float8(d).fill_(torch.nan), "NaN or infinite"),
        (rename("mid_block", "middle"), "it is of another network.*UNet2DConditionModel does not have"),
        (rename("lora_unet_", "lora_unet_double_blocks_"), "it is of another network"),
        (lambda d: d.update({f"{FIRST}.lora_up.weight": torch.ones(9, 2)}), "another network: conv_in has factors"),
    ],
)
def test_files_that_are_no_lora_of_this_network_are_refused(edit: Edit, said: str, tmp_path: Path) -> None:
    network = tiny.unet(mid_block_type="UNetMidBlock2DCrossAttn")
    file = write(tmp_path, "comfyui", network)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=said):
        read(file, network)


@pytest.mark.parametrize(
    "settings",
    [
        '{"unet.lora_alpha": null}',
        '{"unet.lora_alpha": "4"}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": ["conv_in"]}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"conv_in": {}}}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 3}}',
        "[" * 100_000,
    ],
)
def test_settings_that_are_damaged_are_named(settings: str, tmp_path: Path) -> None:
    network = tiny.unet()
    file = write(tmp_path, "diffusers", network)
    save_file(load_file(file), file, {"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=re.escape(f"{file}: the settings of its adapter are damaged")):
        read(file, network)


def test_eight_bits_are_read(tmp_path: Path) -> None:
    network = tiny.unet()
    file = write(tmp_path, "comfyui", network)
    tensors = load_file(file)
    to_float8(tensors)
    save_file(tensors, file)
    up = read(file, network).layers["conv_in"].up
    assert torch.equal(up.flatten(), tensors[f"{FIRST}.lora_up.weight"].flatten())


def test_an_alpha_that_no_file_says_is_given(tmp_path: Path) -> None:
    network = tiny.unet()
    file = write(tmp_path, "comfyui", network)
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "bare.safetensors")
    assert {update.alpha for update in read(tmp_path / "bare.safetensors", network, 5.0).layers.values()} == {5.0}
    with pytest.raises(ValueError, match=r"says its alpha .*: remove the key alpha"):
        read(file, network, 5.0)


@pytest.mark.parametrize(("network", "chosen"), [(tiny.unet(), "attn1.to_q"), (tiny.pixart(), "to_out.0")])
def test_ends_of_names_match_the_chosen_layers_alone(network: nn.Module, chosen: str) -> None:
    modules = modules_of(shapes_of(network))
    wanted = {name for name in modules if name.endswith(chosen)}
    assert endings(wanted, modules) == [chosen]
    some = sorted(wanted)[:1]
    (end,) = endings(some, modules)
    assert [name for name in modules if name == end or name.endswith(f".{end}")] == some


def test_two_updates_joined_are_their_sum() -> None:
    torch.manual_seed(0)
    first = LowRank(torch.randn(2, 4, 3, 3), torch.randn(5, 2, 1, 1), 3.0)
    second = LowRank(torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1), 1.5)
    both = joined(first, second)
    changes = [each.alpha / each.rank * each.up.flatten(1) @ each.down.flatten(1) for each in (first, second, both)]
    assert both.rank == 5
    torch.testing.assert_close(changes[2], changes[0] + changes[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = SD15 | {"cross_attention_dim": tiny.TEXT_WIDTH, "layers_per_block": 2}
    return tiny.write_base(tmp_path_factory.mktemp("project"), "stable_diffusion", **changes)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has trained adapters for a step."""
    lora = f"models.generator.lora={{rank: 3, alpha: 6, targets: {TARGETS}}}"
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = load_config(base, [f"output={folder}", lora, "optimizers.generator.lr=0.05", "ema=null"])
    Trainer(config).run()
    return config


@pytest.fixture(scope="module")
def files(trained: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its exports."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in FORMATS:
        assert main(["export", trained.output, "--out", str(folder / kind), "--format", kind]) == 0
    return {kind: folder / kind for kind in FORMATS}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on a tiny pipeline, and a LoRA for it of rank 2 and alpha 4."""
    base = tiny.write_base(tmp_path_factory.mktemp("small"), "stable_diffusion")
    network = tiny.unet()
    layers = {
        layer: update._replace(alpha=4.0, down=update.down[:2], up=update.up[:, :2] / 4)
        for layer, update in updates_of(network).items()
        if layer.endswith(("attn1.to_q", "conv1"))
    }
    write_lora(base.parent, "comfyui", layers, LoraTarget.of(network), prediction_type="epsilon", name="small")
    return base, base.parent / "small.safetensors"


def begin(base: Path, file: Path, *overrides: str) -> Config:
    return load_config(base, [f"models.generator.initial_lora.path={file}", *overrides])


def factors(config: Config) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in build_sampler(config, CPU).trained.parameters.items()}


KEPT = "models.generator.initial_lora.keep=true"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_goes_on_from_an_export_in_every_format(
    base: Path, trained: Config, files: dict[str, Path], kind: str
) -> None:
    config = begin(base, files[kind], KEPT)
    lora = config.models.generator.lora
    assert lora is not None and (lora.rank, lora.alpha) == (3, 3.0 if kind == "diffusers" else 6.0)
    assert lora.targets == ["conv1", "proj_in", "time_emb_proj", "to_out.0", "to_q"]
    before, now = read_role(*find_weights(Path(trained.output))), factors(config)
    assert before.keys() == now.keys()
    for name, tensor in before.items():
        factor = 2.0 if kind == "diffusers" and ".lora_B." in name else 1.0
        assert torch.equal(now[name], factor * tensor), name


@pytest.mark.slow
def test_merged_it_is_the_network_that_the_adapters_made(
    base: Path, trained: Config, files: dict[str, Path], tmp_path: Path
) -> None:
    assert main(["export", trained.output, "--out", str(tmp_path / "whole")]) == 0
    expected = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    for kind in FORMATS:
        found = factors(begin(base, files[kind]))
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0 if kind == "kohya" else 1e-6)
    plain = load_file(base.parent / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    half = factors(begin(base, files["kohya"], "models.generator.initial_lora.scale=0.5"))
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (plain[name] + expected[name]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_roles_that_begin_with_the_same_share_it_and_the_reference_does_not(base: Path, files: dict[str, Path]) -> None:
    from diffpp_fast.training.build.networks import Networks

    both = [f"models.{role}.initial_lora.path={files['kohya']}" for role in ("generator", "fake")]
    lora = ["models.generator.lora.rank=2", "models.fake.lora.rank=2"]
    networks = Networks(load_config(base, [*both, *lora]), CPU)
    generator, fake, reference = networks.trained("generator"), networks.trained("fake"), networks.reference()
    assert generator.network is fake.network and reference.network is not fake.network
    assert networks.inputs.keys() == {"generator", "reference", "generator_lora", "fake_lora"}
    assert networks.inputs["generator"] != networks.inputs["reference"]
    kept = Networks(load_config(base, [*both, KEPT, lora[1]]), CPU)
    kept.trained("generator")
    assert kept.inputs.keys() == {"reference", "generator_lora"}, "kept, it is an adapter on the reference's copy"


@pytest.mark.slow
def test_a_run_from_a_merged_lora_resumes_exports_and_says_so(
    base: Path, trained: Config, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"output={tmp_path / 'run'}", "models.generator.lora={rank: 2, targets: [to_q, to_k]}", "ema=null"]
    config = begin(base, files["comfyui"], *overrides, "optimizers.generator.lr=0.05")
    Trainer(config).run()
    digest = read_record(find_weights(Path(config.output)).folder)["inputs"]["generator_lora"]
    capsys.readouterr()
    assert main(["plan", str(base), f"models.generator.initial_lora.path={files['comfyui']}", "--gpu", "h100"]) == 0
    assert f"(digest {digest})" in " ".join(capsys.readouterr().out.split())

    for name, options in (("merged", []), ("alone", ["--format", "comfyui"])):
        assert main(["export", config.output, "--out", str(tmp_path / name), *options]) == 0
        card = (tmp_path / name / "README.md").read_text()
        assert f"(digest {digest}), merged into it" in card
    whole = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    # The adapters alone are what the base lacks: those that were trained, and the LoRA below them.
    again = factors(begin(base, tmp_path / "alone"))
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-5)

    longer = begin(base, files["comfyui"], *overrides, "optimizers.generator.lr=0.05", "training.steps=2")
    assert Trainer(longer, resume="latest").run().step == 2
    changed = begin(base, files["kohya"], *overrides, "optimizers.generator.lr=0.05", "training.steps=3")
    with pytest.raises(CheckpointError, match=r"models\.generator\.initial_lora\.path was"):
        Trainer(changed, resume="latest")
    (file,) = files["comfyui"].glob("*.safetensors")
    tensors = load_file(file)
    try:
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
        with pytest.raises(CheckpointError, match=r"models\.generator\.initial_lora.*--accept-changed generator_lora"):
            Trainer(longer, resume="latest")
    finally:
        save_file(tensors, file)


@pytest.mark.slow
def test_a_kept_lora_is_not_needed_for_what_comes_after(
    base: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "start.safetensors"
    (file,) = files["kohya"].glob("*.safetensors")
    copy.write_bytes(file.read_bytes())
    config = begin(base, copy, KEPT, f"output={tmp_path / 'run'}")
    Trainer(config).run()
    copy.unlink()
    assert main(["export", config.output, "--out", str(tmp_path / "out"), "--format", "kohya"]) == 0
    sample = ["sample", "--run", config.output, "a red apple", "--out", str(tmp_path / "a.png")]
    capsys.readouterr()
    assert main(sample) == 2
    assert "--override models.generator.initial_lora.path=" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([KEPT, "models.generator.lora.rank=5"], r"initial_lora.*the file's own adapter is trained, of rank 2"),
        (["models.generator.initial_lora.path=./nowhere.safetensors"], r"initial_lora \(/.*no such file"),
        (["models.generator.initial_lora.alpha=2"], "remove the key alpha"),
        (["models.generator.initial_lora.scale=0"], "scale should be greater than 0"),
    ],
)
def test_configurations_that_can_not_begin(small: tuple[Path, Path], overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        build_sampler(begin(*small, *overrides), CPU)


def test_mixed_ranks_are_merged_and_not_kept(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = small
    file = write(tmp_path, "comfyui", tiny.unet())
    with pytest.raises(ConfigurationError, match=r"initial_lora .*its ranks differ \(2 of .* and 3 of .*merge it"):
        begin(base, file, KEPT)
    assert factors(begin(base, file)).keys() == dict(tiny.unet().named_parameters()).keys()


def test_kept_and_merged_it_makes_the_same_samples(small: tuple[Path, Path]) -> None:
    base, file = small
    z = torch.randn(2, *tiny.LATENT)
    scaled = "models.generator.initial_lora.scale=0.5"
    samples = []
    for overrides in ([], [scaled], [scaled, KEPT], [scaled, "models.generator.lora.rank=2"]):
        config = begin(base, file, *overrides)
        sampler = build_sampler(config, CPU)
        assert sampler.inputs["generator_lora"] is not None
        with torch.no_grad():
            samples.append(sampler.generator(z, sampler.encode(["a red apple", "a green frog"])))
        if KEPT in overrides:
            assert config.models.generator.lora == Lora(rank=2, alpha=2.0, targets=["attn1.to_q", "conv1"])
            # Saved, it says all of it, and needs the file for its digest alone.
            saved = file.with_name("saved.yaml")
            saved.write_text(dump_config(config))
            assert load_config(saved) == config
    for other in samples[2:]:
        torch.testing.assert_close(other, samples[1], rtol=1e-4, atol=1e-4)
    assert (samples[0] - samples[1]).abs().max() > 1e-2
