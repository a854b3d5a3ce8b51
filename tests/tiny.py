"""A whole run's inputs at random weights: networks in diffusers' format, a text encoder, prompts and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

PROMPTS = ("a red apple", "a green frog", "a blue whale", "a yellow sun", "a red frog")
LATENT = (4, 8, 8)
TEXT_WIDTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"

REWARDS = """
import torch


def redness(channel=0):
    return lambda images, prompts: images[:, channel].mean((1, 2))


class Brightness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        assert not self.training and not self.weight.requires_grad
        return self.weight * images.mean((1, 2, 3))


def wrong_shape():
    return lambda images, prompts: images.mean()


def no_gradient():
    return lambda images, prompts: images.detach().mean((1, 2, 3))


def in_place():
    def score(images, prompts):
        images.clamp_(-1, 1)
        images.mul_(0.5).add_(0.5)
        return images[:, 0].mean((1, 2))

    return score


def out_of_place():
    return lambda images, prompts: (images.clamp(-1, 1) * 0.5 + 0.5)[:, 0].mean((1, 2))


def defined_for_some(word="whale"):
    def score(images, prompts):
        out = torch.zeros(len(images))
        for place, prompt in enumerate(prompts):
            if word not in prompt:
                out[place] = images[place].mean()
        return out

    return score


def seeding():
    def score(images, prompts):
        torch.manual_seed(len(prompts))
        return images[:, 0].mean((1, 2))

    return score


def undefined_for(word):
    def score(images, prompts):
        bad = torch.tensor([word in prompt for prompt in prompts])
        return images.mean((1, 2, 3)) * torch.where(bad, torch.nan, 1.0)

    return score
"""


def unet(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A UNet2DConditionModel of about 30 thousand parameters."""
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": LATENT[1],
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return _seeded(lambda: UNet2DConditionModel(**settings | changes), seed)


def sdxl_unet(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A UNet2DConditionModel as Stable Diffusion XL has it: linear projections, several transformer blocks, sizes."""
    settings: dict[str, Any] = {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + TEXT_WIDTH,
    }
    return unet(seed, **settings | changes)


def pixart(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A PixArtTransformer2DModel of two blocks; it predicts a variance, too."""
    from diffusers import PixArtTransformer2DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": LATENT[0],
        "out_channels": 2 * LATENT[0],
        "num_layers": 2,
        "cross_attention_dim": 16,
        "sample_size": LATENT[1],
        "caption_channels": TEXT_WIDTH,
    }
    return _seeded(lambda: PixArtTransformer2DModel(**settings | changes), seed)


def sd3(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """An SD3Transformer2DModel of three blocks, whose first has two attentions, as in Stable Diffusion 3.5 medium."""
    from diffusers import SD3Transformer2DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "num_layers": 3,
        "caption_projection_dim": 16,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 8,
        "sample_size": LATENT[1],
        "pos_embed_max_size": LATENT[1],
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return _seeded(lambda: SD3Transformer2DModel(**settings | changes), seed)


def flux(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A FluxTransformer2DModel of two blocks of each kind."""
    from diffusers import FluxTransformer2DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    }
    return _seeded(lambda: FluxTransformer2DModel(**settings | changes), seed)


def z_image(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A ZImageTransformer2DModel of two blocks, and one of each kind before them."""
    from diffusers import ZImageTransformer2DModel

    settings: dict[str, Any] = {
        "in_channels": LATENT[0],
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": (4, 6, 6),
        "axes_lens": (1024, 16, 16),
    }

    def build() -> torch.nn.Module:
        network = ZImageTransformer2DModel(**settings | changes)
        for token in (network.x_pad_token, network.cap_pad_token):  # zeros at first
            torch.nn.init.normal_(token)
        return network

    return _seeded(build, seed)


def vae(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """An AutoencoderKL that doubles height and width."""
    from diffusers import AutoencoderKL

    settings = {
        "latent_channels": LATENT[0],
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 2 * LATENT[1],
    }
    return _seeded(lambda: AutoencoderKL(**settings | changes), seed)


def write_text_encoder(folder: Path) -> None:
    """A BERT of one layer, and a tokenizer that knows the prompts' words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    settings = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * TEXT_WIDTH,
        max_position_embeddings=16,
    )
    _seeded(lambda: BertModel(settings), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def clip(seed: int = 0, width: int = TEXT_WIDTH, projection: bool = False) -> torch.nn.Module:
    """A CLIP text encoder of two layers; with `projection` one that also gives `text_embeds` of TEXT_WIDTH."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT_WIDTH,
        bos_token_id=52,
        eos_token_id=53,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return _seeded(lambda: kind(settings), seed).eval()


def clip_tokenizer() -> Any:
    """Letters, as CLIP's tokenizer has them inside and at the end of a word."""
    from transformers import CLIPTokenizer

    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5(seed: int = 0) -> torch.nn.Module:
    """T5's encoder, of one layer."""
    from transformers import T5Config, T5EncoderModel

    settings = T5Config(vocab_size=30, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return _seeded(lambda: T5EncoderModel(settings), seed).eval()


def t5_tokenizer() -> Any:
    """Letters, and the space in front of a word."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


#: How a chat is written, as in Qwen's tokenizers.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3(seed: int = 0) -> torch.nn.Module:
    """A Qwen3 of three layers, without head."""
    from transformers import Qwen3Config, Qwen3Model

    settings = Qwen3Config(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return _seeded(lambda: Qwen3Model(settings), seed).eval()


def qwen_tokenizer() -> Any:
    """Letters, space and the end of a line, and the marks of a chat."""
    from transformers import Qwen2Tokenizer

    pieces = [*LETTERS, "A", "R", "\u0120", "\u010a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": pieces[-2:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def sana(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A SanaTransformer2DModel of two blocks."""
    from diffusers import SanaTransformer2DModel

    settings: dict[str, Any] = {
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT_WIDTH,
        "sample_size": LATENT[1],
    }
    return _seeded(lambda: SanaTransformer2DModel(**settings | changes), seed)


def deep_vae(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """An AutoencoderDC that makes four times the height and width."""
    from diffusers import AutoencoderDC

    blocks: dict[str, Any] = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": (1, 1, 2),
        "qkv_multiscales": ((), (), (5,)),
    }
    settings = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in blocks.items()}
    settings |= {"latent_channels": LATENT[0], "attention_head_dim": 4, "scaling_factor": 0.41407}

    def build() -> torch.nn.Module:
        network = AutoencoderDC(**settings | changes)
        for name, weight in network.named_parameters():
            if "norm" in name:  # ones and zeros at first
                torch.nn.init.normal_(weight, 1.0, 0.2)
        return network

    return _seeded(build, seed)


def gemma2(seed: int = 0) -> torch.nn.Module:
    """A Gemma 2 of two layers, without head."""
    from transformers import Gemma2Config, Gemma2Model

    settings = Gemma2Config(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )
    return _seeded(lambda: Gemma2Model(settings), seed).eval()


def gemma_tokenizer() -> Any:
    """Letters, and the space in front of a word."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *LETTERS]
    return GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])


def flow_pipeline(family: str, **changes: Any) -> Any:
    """A whole pipeline of flow matching, by the names of `diffpp_fast.networks.families`' files.

    Args:
        family: which.
        changes: settings of the network.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, StableDiffusion3Pipeline, ZImagePipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "z_image":
        return ZImagePipeline(
            scheduler=scheduler,
            vae=vae(shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=qwen3(),
            tokenizer=qwen_tokenizer(),
            transformer=z_image(**changes).eval(),
        )
    if family == "sana":
        return SanaPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=gemma2(),
            vae=deep_vae(),
            transformer=sana(**changes).eval(),
            scheduler=scheduler,
        )
    return StableDiffusion3Pipeline(
        transformer=sd3(pooled_projection_dim=2 * TEXT_WIDTH, **changes).eval(),
        scheduler=scheduler,
        vae=vae(shift_factor=0.0609, scaling_factor=1.5305, use_post_quant_conv=False, use_quant_conv=False),
        text_encoder=clip(width=4, projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(seed=1, width=4, projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def pipeline(family: str, **changes: Any) -> Any:
    """A whole pipeline of diffusers: "stable_diffusion", "stable_diffusion_xl" or "pixart", or of flow matching.

    Args:
        family: which.
        changes: `prediction_type` of the scheduler, `force_zeros_for_empty_prompt`, and settings of the network.
    """
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    if family not in ("stable_diffusion", "stable_diffusion_xl", "pixart"):
        return flow_pipeline(family, **changes)

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=changes.pop("prediction_type", "epsilon"),
    )
    zeros = changes.pop("force_zeros_for_empty_prompt", True)
    if family == "pixart":
        network = pixart(**changes)
        # Networks begin as zero at these places, and would not listen to their conditioning.
        with torch.random.fork_rng(devices=[]):
            torch.nn.init.normal_(network.proj_out.weight, std=0.3)
        return PixArtAlphaPipeline(
            tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae(), transformer=network.eval(), scheduler=scheduler
        )
    if family == "stable_diffusion":
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=clip(),
            tokenizer=clip_tokenizer(),
            unet=unet(**changes).eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(width=TEXT_WIDTH // 2),
        text_encoder_2=clip(seed=1, width=TEXT_WIDTH // 2, projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(**changes).eval(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def write_base(folder: Path, family: str, **changes: Any) -> Path:
    """A run on a whole pipeline in `folder / "base"`; returns the configuration's path."""
    pipeline(family, **changes).save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    config = folder / "align.yaml"
    training = {"steps": 1, "global_batch": 2, "log_every": 1, "checkpoint_every": 1}
    shape = {"models": {"base": "base"}, "training": training}
    reward = {"optimised": {"factory": "rewards.py:redness", "arguments": {"channel": 0}, "scale": 2.0}}
    config.write_text(yaml.safe_dump({**settings(), **shape, "rewards": reward}, sort_keys=False))
    return config


def settings() -> dict[str, Any]:
    """The configuration that `write` writes; paths are relative to its folder."""
    return {
        "seed": 7,
        "output": "run",
        "device": "cpu",
        "prompts": "prompts.txt",
        "models": {
            "text_encoder": {"path": "weights/text", "max_length": 8},
            "scheduler": {"path": "weights/scheduler"},
            "reference": {"path": "weights/reference"},
            "generator": {"path": "weights/generator", "timestep": 625},
            "decoder": {"path": "weights/vae"},
            "latent_shape": list(LATENT),
        },
        "method": {"name": "diff_instruct_pp", "guidance_scale": 1.5},
        "rewards": {
            "optimised": {"factory": "rewards.py:redness", "arguments": {"channel": 0}, "scale": 2.0},
            "held_out": {"factory": "rewards.py:Brightness"},
        },
        "optimizers": {
            "generator": {"lr": 1e-3, "betas": [0.0, 0.99], "clip": 10.0, "warmup_steps": 2},
            "fake": {"lr": 1e-3, "betas": [0.0, 0.99], "clip": 10.0},
        },
        "ema": {"decay": 0.9},
        "training": {
            "steps": 4,
            "global_batch": 4,
            "log_every": 1,
            "grid_every": 2,
            "checkpoint_every": 2,
            "grid_prompts": 3,
            "baseline_steps": 1,
        },
    }


def write(folder: Path) -> Path:
    """Everything that a run needs, in `folder`; returns the configuration's path."""
    from diffusers import DDPMScheduler

    weights = folder / "weights"
    unet(seed=0).save_pretrained(weights / "reference")
    unet(seed=1).save_pretrained(weights / "generator")
    vae().save_pretrained(weights / "vae")
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        weights / "scheduler"
    )
    write_text_encoder(weights / "text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    config = folder / "align.yaml"
    config.write_text(yaml.safe_dump(settings(), sort_keys=False))
    return config


def _seeded(build: Any, seed: int) -> Any:
    """Initialised from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def project(folder: Path) -> Iterator[Path]:
    """Writes what `write` does; within the block, the folder is the working directory."""
    import pytest

    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
