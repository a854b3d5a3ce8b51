"""Addressed random numbers as tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import INT32_ELEMENTS, MOST_PROGRAMS, block_of_sample, tile
from diffpp_fast.ops.triton.random import normals, words

#: With 128 threads, 16 elements each; 32 where that leaves programs enough for every multiprocessor: what comes before
#: the first takes as long as two.
BLOCK = 2048
LARGE = 1 << 20
#: Samples of a program that draws one number for each.
BLOCK_SAMPLES = 128


@on_its_device
def normal(samples: Tensor, seed: int, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    batch = samples.shape[0]
    drawn = samples.new_empty((batch, count), dtype=dtype)
    if drawn.numel():
        block = BLOCK if drawn.numel() < LARGE else 2 * BLOCK
        blocks = triton.cdiv(count, block)
        _normal[batch, min(blocks, MOST_PROGRAMS), triton.cdiv(blocks, MOST_PROGRAMS)](
            p_to=drawn,
            p_samples=samples.contiguous(),
            noise_seed=seed,
            noise_stream=stream,
            count=count,
            WIDE=count >= INT32_ELEMENTS,
            BLOCK=block,
        )
    return drawn


@on_its_device
def uniform(samples: Tensor, seed: int, stream: int) -> Tensor:
    batch = samples.shape[0]
    drawn = samples.new_empty(batch, dtype=torch.float32)
    if batch:
        _uniform[(triton.cdiv(batch, BLOCK_SAMPLES),)](
            p_to=drawn,
            p_samples=samples.contiguous(),
            noise_seed=seed,
            noise_stream=stream,
            batch=batch,
            BLOCK=BLOCK_SAMPLES,
        )
    return drawn


@on_its_device
def integers(samples: Tensor, seed: int, stream: int, low: int, span: int) -> Tensor:
    batch = samples.shape[0]
    drawn = samples.new_empty(batch)
    if batch:
        _integers[(triton.cdiv(batch, BLOCK_SAMPLES),)](
            p_to=drawn,
            p_samples=samples.contiguous(),
            noise_seed=seed,
            noise_stream=stream,
            low=low,
            span=span,
            batch=batch,
            BLOCK=BLOCK_SAMPLES,
        )
    return drawn


@triton.jit(do_not_specialize=["noise_seed", "noise_stream"])
def _normal(p_to, p_samples, noise_seed, noise_stream, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    b_at, m_inside, b_block, b_lane = tile(
        block_of_sample(), count, 1, p_to.dtype.element_ty, 0, False, False, WIDE, BLOCK
    )
    b_drawn = normals(noise_seed, noise_stream, tl.load(p_samples + b), b_block, b_lane)
    tl.store(p_to + b.to(tl.int64) * count + b_at, b_drawn.to(p_to.dtype.element_ty), mask=m_inside)


@triton.jit
def _first_word(p_samples, seed, stream, b_sample, batch):
    """Lane 0 of block 0 of each sample."""
    b_number = tl.load(p_samples + b_sample, mask=b_sample < batch, other=0)
    word, _, _, _ = words(seed, stream, b_number, b_sample ^ b_sample)
    return word


@triton.jit(do_not_specialize=["noise_seed", "noise_stream"])
def _uniform(p_to, p_samples, noise_seed, noise_stream, batch, BLOCK: tl.constexpr):
    b_sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_word = _first_word(p_samples, noise_seed, noise_stream, b_sample, batch)
    tl.store(p_to + b_sample, (b_word >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=b_sample < batch)


@triton.jit(do_not_specialize=["noise_seed", "noise_stream", "low", "span"])
def _integers(p_to, p_samples, noise_seed, noise_stream, low, span, batch, BLOCK: tl.constexpr):
    b_sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_word = _first_word(p_samples, noise_seed, noise_stream, b_sample, batch).to(tl.uint64)
    # span is at most 2^32, so the unsigned product fits in 64 bits.
    b_offset = (b_word * tl.cast(span, tl.uint64)) >> 32
    tl.store(p_to + b_sample, low + b_offset.to(tl.int64), mask=b_sample < batch)
