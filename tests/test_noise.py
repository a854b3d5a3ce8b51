"""The addresses of random numbers: Philox against published answers, and against plain Python."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from philox_answers import PUBLISHED

from diffpp_fast import Noise
from diffpp_fast.philox import philox4x32

pytestmark = pytest.mark.usefixtures("backend")

SEED = 0x0123456789ABCDEF


def python_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def python_word(seed: int, stream: int, sample: int, element: int) -> int:
    counter = (element // 4, stream, sample % 2**32, (sample >> 32) % 2**32)
    return python_philox(counter, (seed % 2**32, seed >> 32))[element % 4]


def python_normal(seed: int, stream: int, sample: int, element: int) -> float:
    """Float32 where rounding decides which number is drawn, float64 after."""
    pair = element - element % 2
    a, b = (python_word(seed, stream, sample, pair + lane) for lane in (0, 1))
    u1 = float(np.float32(np.float32(a) * np.float32(2.0**-32) + np.float32(2.0**-33)))
    u2 = float(np.float32(b)) * 2.0**-32
    radius = math.sqrt(-2.0 * math.log(u1))
    return radius * (math.sin if element % 2 else math.cos)(2.0 * math.pi * u2)


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    words = philox4x32([torch.tensor([word]) for word in counter], key)
    assert " ".join(f"{int(word):08x}" for word in words) == answer
    assert " ".join(f"{word:08x}" for word in python_philox(counter, key)) == answer


@given(
    seed=st.integers(0, 2**64 - 1),
    samples=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    stream=st.integers(0, 2**32 - 1),
    elements=st.integers(1, 11),
)
def test_equals_plain_python(seed: int, samples: list[int], stream: int, elements: int) -> None:
    noise = Noise(seed, torch.tensor(samples), stream)
    words = [python_word(seed, stream, sample, 0) for sample in samples]
    assert noise.uniform().tolist() == [(word >> 8) * 2.0**-24 for word in words]
    assert noise.integers(-7, 1000).tolist() == [-7 + ((word * 1007) >> 32) for word in words]
    assert noise.integers(0, 2**32).tolist() == words
    expected = [[python_normal(seed, stream, sample, i) for i in range(elements)] for sample in samples]
    torch.testing.assert_close(noise.normal((elements,)), torch.tensor(expected), rtol=0.0, atol=3e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    samples = torch.tensor([5, 2**40 + 5, 7, 0, 2**63 - 1])
    whole = Noise(SEED, samples)
    for b, sample in enumerate(samples):
        alone = Noise(SEED, sample.reshape(1))
        assert torch.equal(alone.normal((3, 5, 7))[0], whole.normal((3, 5, 7))[b])
        assert torch.equal(alone.uniform()[0], whole.uniform()[b])
        assert torch.equal(alone.integers(0, 1000)[0], whole.integers(0, 1000)[b])


def test_a_resumed_run_sees_the_same_numbers() -> None:
    run = Noise(SEED, torch.arange(12)).normal((4, 3))
    resumed = Noise(SEED, torch.arange(8, 12)).normal((4, 3))
    assert torch.equal(run[8:], resumed)


def test_elements_are_numbered_in_row_major_order() -> None:
    noise = Noise(SEED, torch.arange(3))
    flat = noise.normal((24,))
    assert torch.equal(noise.normal((2, 3, 4)).flatten(1), flat)
    assert torch.equal(noise.normal((10,)), flat[:, :10])
    assert torch.equal(noise.normal(()), flat[:, 0])


def test_every_part_of_the_address_matters() -> None:
    def first(seed: int, sample: int, stream: int) -> float:
        return Noise(seed, torch.tensor([sample]), stream).normal((1,)).item()

    base = first(1, 2, 3)
    others = [first(1 + 2**32, 2, 3), first(2, 2, 3), first(1, 2 + 2**32, 3), first(1, 3, 3), first(1, 2, 4)]
    assert len({base, *others}) == 6


def test_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    noise = Noise(SEED, torch.arange(4))
    noise.normal((5,)), noise.uniform(), noise.integers(0, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_normal_moments_and_independence() -> None:
    z = Noise(SEED, torch.arange(64)).normal((4096,)).double()
    count = z.numel()
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(z.pow(power).mean().item() - moment) < 5.0 * math.sqrt(variance / count)
    for a, b in ((z[:, 0::2], z[:, 1::2]), (z[:, :-4], z[:, 4:]), (z[:-1], z[1:])):
        assert abs((a * b).mean().item()) < 5.0 / math.sqrt(a.numel())
    other_stream = Noise(SEED, torch.arange(64), stream=2).normal((4096,)).double()
    assert abs((z * other_stream).mean().item()) < 5.0 / math.sqrt(count)
    assert z.abs().max() < math.sqrt(2.0 * 33.0 * math.log(2.0)) + 1e-5


def test_uniform_and_integers_are_even() -> None:
    noise = Noise(SEED, torch.arange(2**14), stream=2)
    u = noise.uniform()
    assert u.dtype == torch.float32
    assert u.min() >= 0.0 and u.max() < 1.0
    assert abs(u.double().mean().item() - 0.5) < 5.0 / math.sqrt(12 * len(u))
    drawn = noise.integers(3, 11)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn - 3, minlength=8).double()
    assert len(counts) == 8
    chi_square = ((counts - len(u) / 8).square() / (len(u) / 8)).sum().item()
    assert chi_square < 30.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_a_cast_of_float32(dtype: torch.dtype) -> None:
    noise = Noise(SEED, torch.arange(4))
    assert torch.equal(noise.normal((9,), dtype=dtype), noise.normal((9,)).to(dtype))


def test_empty() -> None:
    assert Noise(SEED, torch.empty(0, dtype=torch.int64)).normal((3, 4)).shape == (0, 3, 4)
    assert Noise(SEED, torch.arange(2)).normal((0, 4)).shape == (2, 0, 4)


def test_errors_name_what_is_wrong() -> None:
    samples = torch.arange(3)
    with pytest.raises(TypeError, match=r"samples must be an int64 tensor, got torch\.int32"):
        Noise(0, samples.int())
    with pytest.raises(TypeError, match="samples must be an int64 tensor, got list"):
        Noise(0, [1, 2])
    with pytest.raises(ValueError, match=r"samples must have shape \[B\]"):
        Noise(0, samples.reshape(3, 1))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must be in"):
            Noise(seed, samples)
    with pytest.raises(ValueError, match="stream must be in"):
        Noise(0, samples, stream=2**32)
    noise = Noise(0, samples)
    with pytest.raises(ValueError, match="low must be below high"):
        noise.integers(5, 5)
    with pytest.raises(ValueError, match=r"at most 2\^32"):
        noise.integers(0, 2**32 + 1)
    with pytest.raises(ValueError, match="fit in int64"):
        noise.integers(2**63 - 1, 2**63 + 5)
    with pytest.raises(ValueError, match="negative size"):
        noise.normal((3, -1))
    with pytest.raises(ValueError, match=r"less than 2\^34"):
        noise.normal((2**20, 2**14))
    with pytest.raises(TypeError, match="floating-point"):
        noise.normal((3,), dtype=torch.int64)


def test_no_stream_of_the_package_is_one_of_the_users() -> None:
    from diffpp_fast.methods import base
    from diffpp_fast.noise import USER_STREAMS

    streams = {name: value for name, value in vars(base).items() if name.isupper() and isinstance(value, int)}
    assert len(set(streams.values())) == len(streams) == 12
    assert not [name for name, value in streams.items() if value in USER_STREAMS]
