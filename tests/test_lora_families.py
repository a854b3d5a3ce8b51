"""LoRA of flow transformers: files for other programs, files that are read back or refused, and what is adapted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flux
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_initial_lora import assert_changes, read
from test_lora_formats import changes_of, folder, updates_of, write
from torch import Tensor, nn

from diffpp_fast.networks.families import FAMILIES, family_of
from diffpp_fast.networks.lora import inject
from diffpp_fast.networks.lora_files import endings
from diffpp_fast.networks.lora_formats import LoraFormat, LoraTarget, LowRank, is_carried, write_lora
from diffpp_fast.training import ConfigurationError, load_config
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.export import LoraSource, export_lora
from diffpp_fast.training.exported import Exported

CPU = torch.device("cpu")
#: By family: a tiny network, the pipeline that loads its LoRAs, and the formats besides diffusers' own.
NETWORKS: dict[str, tuple[Callable[[], Any], str, tuple[LoraFormat, ...]]] = {
    "sd3": (tiny.sd3, "StableDiffusion3Pipeline", ("comfyui", "kohya")),
    "flux": (lambda: tiny.flux(guidance_embeds=True), "FluxPipeline", ("comfyui", "kohya")),
    "flux_2": (lambda: tiny_flux.flux_2(guidance_embeds=True), "Flux2KleinPipeline", ("comfyui", "kohya")),
    "z_image": (tiny.z_image, "ZImagePipeline", ("comfyui", "kohya")),
    "qwen_image": (tiny_flux.qwen_image, "QwenImagePipeline", ("comfyui", "kohya")),
    "sana": (tiny.sana, "SanaPipeline", ()),
}
CASES: list[tuple[str, LoraFormat]] = [
    (family, kind) for family, (_, _, more) in NETWORKS.items() for kind in ("diffusers", *more)
]
#: ComfyUI's files are diffusers'. Of kohya's, diffusers' converter for FLUX.1 has the true width in it, and there is
#: none for Stable Diffusion 3.
LOADED = [case for case in CASES if case[1] != "comfyui" and case not in (("sd3", "kohya"), ("flux", "kohya"))]


def pipeline_of(family: str) -> Any:
    import diffusers

    return getattr(diffusers, NETWORKS[family][1])


@pytest.mark.parametrize(("family", "kind"), LOADED)
def test_diffusers_loads_what_was_written(family: str, kind: LoraFormat, tmp_path: Path) -> None:
    """All layers that the format carries, through the pipeline's own loader."""
    network = NETWORKS[family][0]()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    changes = changes_of(network, updates_of(network, kind))
    file = write(tmp_path, kind, network)
    loader = pipeline_of(family)
    state, metadata = loader.lora_state_dict(tmp_path, weight_name=file.name, return_lora_metadata=True)[:2]
    network.load_lora_adapter(state, prefix="transformer", metadata=metadata if kind != "kohya" else None)
    network.fuse_lora()
    network.unload_lora()
    loaded = network.state_dict()
    for layer, change in changes.items():
        name = f"{layer}.weight"
        torch.testing.assert_close((loaded[name] - before[name]).flatten(1), change, rtol=1e-4, atol=1e-4, msg=name)
    changed = {name for name in before if not torch.equal(loaded[name], before[name])}
    assert changed == {f"{layer}.weight" for layer in changes}


@pytest.mark.parametrize("family", [family for family, kind in CASES if kind == "comfyui"])
def test_comfyuis_file_is_diffusers_under_another_name(family: str, tmp_path: Path) -> None:
    """`transformer.LAYER`, B A without alpha: all layers but some outside of FLUX.2's blocks, which it can't name."""
    network = NETWORKS[family][0]()
    updates, target = updates_of(network), LoraTarget.of(network)
    carried = {layer: update for layer, update in updates.items() if is_carried("comfyui", layer, target)}
    embedders = [f"time_guidance_embed.{part}_embedder.linear_{n}" for part in ("timestep", "guidance") for n in (1, 2)]
    streams = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    unknown = {*embedders, *(f"{stream}.linear" for stream in streams)}
    assert updates.keys() - carried.keys() == (unknown if family == "flux_2" else set())
    files = {}
    for kind in ("diffusers", "comfyui"):
        write_lora(folder(tmp_path, kind), kind, carried, target, prediction_type="", name="mine")
        (file,) = (tmp_path / kind).glob("*.safetensors")
        files[file.name] = load_file(file)
    theirs = files["pytorch_lora_weights.safetensors"]
    assert files["mine.safetensors"].keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in files["mine.safetensors"].items())


def test_diffusers_reads_flux_1_of_true_width_from_kohyas_file(tmp_path: Path) -> None:
    """Queries, keys, values and the feed-forward layer of a block are one module there, also where one is missing."""
    with torch.device("meta"):
        network = tiny.flux(num_attention_heads=24, attention_head_dim=128, num_layers=1, num_single_layers=2)
    torch.manual_seed(0)
    updates: dict[str, LowRank] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and "blocks." in name and name != "single_transformer_blocks.1.attn.to_k":
            rows, inputs = layer.weight.shape
            updates[name] = LowRank(torch.randn(2, inputs), torch.randn(rows, 2), 3.0)
    write_lora(tmp_path, "kohya", updates, LoraTarget.of(network), prediction_type="", name="lora")
    tensors = load_file(tmp_path / "lora.safetensors")
    up = tensors["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    assert up.shape == (7 * 3072, 8) and tensors["lora_unet_single_blocks_1_linear1.alpha"] == 12.0
    state = pipeline_of("flux").lora_state_dict(tmp_path, weight_name="lora.safetensors")
    for layer, update in updates.items():
        down, up = (state.pop(f"transformer.{layer}.lora_{side}.weight") for side in "AB")
        probe = torch.randn(down.shape[1])
        expected = 1.5 * update.up @ (update.down @ probe)
        torch.testing.assert_close(up @ (down @ probe), expected, rtol=1e-4, atol=1e-2, msg=layer)
    missing = {f"transformer.single_transformer_blocks.1.attn.to_k.lora_{side}.weight" for side in "AB"}
    assert state.keys() == missing and not any(tensor.any() for tensor in state.values())


def of_kohya(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """A module's change by the rule of kohya's programs."""
    down, up = (tensors[f"lora_unet_{module}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
    return tensors[f"lora_unet_{module}.alpha"].item() / len(down) * up @ down


def test_stable_diffusion_3_has_its_authors_modules_in_kohyas_file(tmp_path: Path) -> None:
    network = tiny.sd3()
    changes = changes_of(network, updates_of(network))
    tensors = load_file(write(tmp_path, "kohya", network))
    expected: dict[str, Tensor] = {}
    for number in range(3):
        theirs, ours = f"joint_blocks_{number}_", f"transformer_blocks.{number}."
        for stream, stem, names in (
            ("x_block_attn", "attn.", ("to_q", "to_k", "to_v")),
            ("x_block_attn2", "attn2.", ("to_q", "to_k", "to_v")),
            ("context_block_attn", "attn.", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            if ours + stem + names[0] in changes:
                parts = [changes[ours + stem + name] for name in names]
                expected[f"{theirs}{stream}_qkv"] = torch.cat(parts)
        for module, layer in (
            ("x_block_attn_proj", "attn.to_out.0"),
            ("x_block_attn2_proj", "attn2.to_out.0"),
            ("context_block_attn_proj", "attn.to_add_out"),
            ("x_block_mlp_fc1", "ff.net.0.proj"),
            ("x_block_mlp_fc2", "ff.net.2"),
            ("context_block_mlp_fc1", "ff_context.net.0.proj"),
            ("context_block_mlp_fc2", "ff_context.net.2"),
            ("x_block_adaLN_modulation_1", "norm1.linear"),
            ("context_block_adaLN_modulation_1", "norm1_context.linear"),
        ):
            if ours + layer in changes:
                expected[theirs + module] = changes[ours + layer]
    for module, layer in (
        ("x_embedder_proj", "pos_embed.proj"),
        ("context_embedder", "context_embedder"),
        ("t_embedder_mlp_0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder_mlp_2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder_mlp_0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder_mlp_2", "time_text_embed.text_embedder.linear_2"),
        ("final_layer_adaLN_modulation_1", "norm_out.linear"),
        ("final_layer_linear", "proj_out"),
    ):
        expected[module] = changes[layer]
    # diffusers scales before it shifts where its class of norm has no gate: in the last layers.
    for module in ("final_layer_adaLN_modulation_1", "joint_blocks_2_context_block_adaLN_modulation_1"):
        expected[module] = expected[module].roll(len(expected[module]) // 2, 0)
    assert {name.partition(".")[0] for name in tensors} == {f"lora_unet_{module}" for module in expected}
    for module, change in expected.items():
        torch.testing.assert_close(of_kohya(tensors, module), change, rtol=1e-4, atol=1e-4, msg=module)


@pytest.mark.parametrize(
    ("family", "program", "base"),
    [
        ("flux", "lora_flux", "flux1"),
        ("sd3", "lora_sd3", None),
        ("flux_2", "lora_flux_2", None),
        ("qwen_image", "lora_qwen_image", "qwen_image"),
        ("z_image", "lora_zimage", "z_image"),
    ],
)
def test_kohyas_metadata_names_the_program(family: str, program: str, base: str | None, tmp_path: Path) -> None:
    file = write(tmp_path, "kohya", NETWORKS[family][0](), dtype=torch.bfloat16)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["ss_network_module"] == f"networks.{program}" and facts.get("ss_base_model_version") == base
    assert facts["ss_network_dim"] == facts["ss_network_alpha"] == "Dynamic"
    for name, tensor in load_file(file).items():
        assert tensor.dtype == (torch.float32 if name.endswith(".alpha") else torch.bfloat16)


#: Modules that hold several layers, by family: how a file calls one, and what it holds.
WHOLE = [
    ("flux", "diffusion_model.double_blocks.1.txt_attn.qkv", "transformer_blocks.1.attn.add_{}_proj", "qkv"),
    ("flux", "transformer.transformer_blocks.0.attn.to_qkv", "transformer_blocks.0.attn.to_{}", "qkv"),
    ("flux_2", "lora_unet_double_blocks_0_img_attn_qkv", "transformer_blocks.0.attn.to_{}", "qkv"),
    (
        "flux_2",
        "base_model.model.transformer_blocks.0.attn.to_added_qkv",
        "transformer_blocks.0.attn.add_{}_proj",
        "qkv",
    ),
    ("z_image", "lora_unet_layers_1_attention_qkv", "layers.1.attention.to_{}", "qkv"),
    ("sd3", "diffusion_model.joint_blocks.0.x_block.attn2.qkv", "transformer_blocks.0.attn2.to_{}", "qkv"),
    ("sana", "transformer.transformer_blocks.0.attn2.to_kv", "transformer_blocks.0.attn2.to_{}", "kv"),
]


@pytest.mark.parametrize(("family", "module", "layer", "parts"), WHOLE)
def test_an_update_of_several_layers_is_taken_apart(
    family: str, module: str, layer: str, parts: str, tmp_path: Path
) -> None:
    """One that has been trained as a whole: A is of all of them."""
    network = NETWORKS[family][0]()
    layers = [layer.format(part) for part in parts]
    rows, inputs = network.get_submodule(layers[0]).weight.shape
    down, up = torch.randn(len(parts), inputs), torch.randn(len(parts) * rows, len(parts))
    save_file(
        {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(6.0)},
        tmp_path / "lora.safetensors",
    )
    changes = (6.0 / len(parts) * up @ down).chunk(len(parts))
    assert_changes(read(tmp_path / "lora.safetensors", network).layers, dict(zip(layers, changes, strict=True)))


#: What is left as it is by default: layers that embed, modulate, mix no channels or predict.
LEFT = {
    "sd3": r"(pos_embed|time_text_embed|context_embedder|norm_out|proj_out)\b.*|.*\.norm1(_context)?\.linear",
    "flux": r"(x_embedder|time_text_embed|context_embedder|norm_out|proj_out)\b.*|.*\.norm(1|1_context)?\.linear",
    "flux_2": r"(x_embedder|time_guidance_embed|context_embedder|norm_out|proj_out)\b.*|(double|single)_stream_mod.*",
    "z_image": r"(all_x_embedder|t_embedder|cap_embedder|all_final_layer)\b.*|.*\.adaLN_modulation\.0",
    "qwen_image": r"(img_in|txt_in|time_text_embed|norm_out|proj_out)\b.*|.*\.(img|txt)_mod\.1",
    "sana": r"(patch_embed|time_embed|caption_projection|proj_out)\b.*|.*\.ff\.conv_depth",
}


@pytest.mark.parametrize("family", NETWORKS)
def test_default_targets_are_all_projections(family: str) -> None:
    assert len(NETWORKS) == len(FAMILIES)
    network = NETWORKS[family][0]()
    names = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    found = family_of(network)
    assert found is not None
    adapted = inject(network, "generator", rank=2, alpha=2, targets=found.lora_targets).keys()
    assert adapted == {name for name in names if not re.fullmatch(LEFT[family], name)} and len(adapted) > 15
    ends = [target.rpartition("*.")[2] for target in found.lora_targets]
    assert all(any(name.endswith(f".{end}") for name in adapted) for end in ends), "a target that nothing has"


@pytest.mark.parametrize(
    ("make", "end", "short"),
    [
        (tiny.flux, r".*\.to_q|single.*\.proj_out", ["single_transformer_blocks.*.proj_out", "to_q"]),
        (tiny_flux.flux_2, r"single.*\.to_out", ["single_transformer_blocks.*.attn.to_out"]),
    ],
)
def test_targets_of_all_blocks_are_short(make: Callable[[], Any], end: str, short: list[str]) -> None:
    network = make()
    modules = [name for name, _ in network.named_modules() if name]
    chosen = {name for name in modules if re.fullmatch(end, name)}
    assert endings(chosen, modules) == short
    assert inject(network, "generator", rank=2, alpha=2, targets=endings(chosen, modules)).keys() == chosen


def test_a_convolution_in_groups_gets_no_adapter() -> None:
    with pytest.raises(ValueError, match=r"0\.ff\.conv_depth is a convolution in groups.*name others as targets"):
        inject(tiny.sana(), "generator", rank=2, alpha=2, targets=["to_q", "conv_depth"])


Edit = Callable[[dict[str, Tensor]], Any]
BLOCK = "transformer.transformer_blocks.0.attn.to_q"


def kohyas(name: str) -> Edit:
    """Adds a module of kohya's names to what is there."""
    return lambda d: d.update(
        {f"{name}.lora_down.weight": torch.ones(3, 32), f"{name}.lora_up.weight": torch.ones(96, 3)}
    )


def alone(edit: Edit) -> Edit:
    """Lets an edit begin with nothing."""

    def edited(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        edit(tensors)

    return edited


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
MISFITS: dict[str, tuple[Callable[[], Any], Edit, str]] = {
    "FLUX.1 on Z-Image": (
        tiny.z_image, lambda d: None,
        r"another network: \d+ of its \d+ tensors .* ZImageTransformer2DModel .*as in FLUX\): give a LoRA of this",
    ),
    "FLUX.1 on Qwen-Image": (
        tiny_flux.qwen_image, lambda d: None,
        r"QwenImageTransformer2DModel does not have.*\(as in FLUX\).*take its own as base",
    ),
    "another width": (
        lambda: tiny.flux(attention_head_dim=20), lambda d: None, r"factors of shape .*: give a LoRA of this one"
    ),
    "two ranks": (
        tiny.flux, lambda d: d.update({f"{BLOCK}.lora_B.weight": torch.ones(32, 7)}),
        "A of transformer_blocks.0.attn.to_q has rank . and B 7: the file is damaged",
    ),
    "two formats": (tiny.flux, kohyas(QKV), r"two updates of .*attn.to_[qkv].*: give a file of one adapter"),
    "no alpha": (tiny.flux, alone(kohyas(QKV)), "says no alpha.*_qkv has none.*key alpha"),
    "half": (tiny.flux, lambda d: d.pop(f"{BLOCK}.lora_B.weight"), "not whole: .*attn.to_q lacks A or B.*Get it anew"),
    "another format's alpha": (
        tiny.flux, lambda d: d.update({"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(1.0)}),
        "not whole: transformer_blocks.0.attn.to_out.0 lacks A or B",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    base, edit, said = MISFITS[case]
    file = write(tmp_path, "diffusers", tiny.flux())
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=said):
        read(file, base())


def test_text_encoders_beside_a_transformer_are_left_out(tmp_path: Path) -> None:
    network = tiny.flux()
    file = write(tmp_path, "kohya", network)
    more = [
        f"{name}.lora_down.weight"
        for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0")
    ]
    more.append("text_encoders.t5xxl.transformer.encoder.block.0.lora_A.weight")
    save_file(load_file(file) | {name: torch.ones(2, 4) for name in more}, file)
    found = read(file, network)
    assert found.text == 3 and found.layers.keys() == updates_of(network, "kohya").keys()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_was_written_is_read_back(family: str, kind: LoraFormat, tmp_path: Path) -> None:
    network = NETWORKS[family][0]()
    written = updates_of(network, kind)
    found = read(write(tmp_path, kind, network), network)
    assert_changes(found.layers, changes_of(network, written))
    for layer, update in found.layers.items():
        assert torch.equal(update.down, written[layer].down), layer


#: Names of pipelines, where they are not the families'.
PIPELINES = {"sd3": "stable_diffusion_3"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in found:
            makes: Any = tiny_flux if family in tiny_flux.LATENTS else tiny
            found[family] = makes.write_base(tmp_path_factory.mktemp(family), PIPELINES.get(family, family))
            data = yaml.safe_load(found[family].read_text())
            data["models"].setdefault("latent_shape", list(tiny.LATENT))
            found[family].write_text(yaml.safe_dump(data, sort_keys=False))
        return found[family]

    return base


def own_formats(family: str) -> tuple[LoraFormat, ...]:
    return ("diffusers", *NETWORKS[family][2])


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORKS)
def test_a_run_goes_on_from_its_export_in_every_format(
    bases: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Merged or kept, with the family's own targets."""
    config = load_config(bases(family), ["models.generator.lora={rank: 2, alpha: 3}"])
    trained = build_sampler(config, CPU).trained
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    exported = Exported(config, trained)
    found = next(each for each in FAMILIES if type(exported._network).__name__ in each.kinds)
    assert config.models.generator.lora is not None and config.models.generator.lora.targets == [*found.lora_targets]
    expected = {name: exported.weight(name) for name in exported.shapes}
    for kind in own_formats(family):
        out = tmp_path / kind
        export_lora(out, config, trained, LoraSource(exported, kind))
        card = (out / "README.md").read_text(encoding="utf-8")
        assert ("load_lora_weights" in card) == ((family, kind) != ("sd3", "kohya"))
        file = next(out.glob("*.safetensors"))
        for keep in ("false", "true"):
            begun = load_config(bases(family), [f"models.generator.initial_lora={{path: {file}, keep: {keep}}}"])
            now = Exported(begun, build_sampler(begun, CPU).trained)
            for name, weight in expected.items():
                torch.testing.assert_close(now.weight(name), weight, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORKS)
def test_a_change_of_all_weights_is_extracted_in_every_format(
    bases: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    config = load_config(bases(family))
    trained = build_sampler(config, CPU).trained
    network = trained.network
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after, target = network.state_dict(), LoraTarget.of(network)
    rank = 16 if family in ("sd3", "sana") else 32  # of most of its layers
    exported = Exported(config, trained)
    for kind in own_formats(family):
        source = LoraSource(exported, kind, rank=rank)
        extraction = export_lora(tmp_path / kind, config, trained, source)
        assert extraction is not None and 0.1 < extraction.kept < 1.0
        (file,) = (tmp_path / kind).glob("*.safetensors")
        layers = read(file, network).layers
        assert layers.keys() == {layer for layer in exported.linear if is_carried(kind, layer, target)}
        whole = [layer for layer, update in layers.items() if min(after[f"{layer}.weight"].flatten(1).shape) <= rank]
        changes = {layer: after[f"{layer}.weight"] - before[f"{layer}.weight"] for layer in whole}
        assert len(whole) > 20
        assert_changes({layer: layers[layer] for layer in whole}, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "target", "said"),
    [
        ("flux", "kohya", "norm_out.linear", "norm_out.linear have adapters that kohya's sd-scripts do not read"),
        ("flux_2", "comfyui", "single_stream_modulation.linear", "that ComfyUI does not read: use .* diffusers"),
        ("flux_2", "kohya", "x_embedder", "kohya's musubi-tuner do not read: use the format comfyui or diffusers"),
        ("sana", "comfyui", "to_q", "no names of ComfyUI are known here for a SanaTransformer2DModel: use"),
    ],
)  # fmt: skip
def test_formats_name_what_they_do_not_carry(
    bases: Callable[[str], Path], family: str, kind: LoraFormat, target: str, said: str
) -> None:
    config = load_config(bases(family), [f"models.generator.lora={{rank: 2, targets: [{target}, to_k]}}"])
    exported = Exported(config, build_sampler(config, CPU).trained)
    with pytest.raises(ConfigurationError, match=f"--format {kind}: .*{said}"):
        LoraSource(exported, kind)
