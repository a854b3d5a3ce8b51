"""The host module: Philox against published answers, the resize tables against the reference, facts of the build."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from philox_answers import PUBLISHED

from diffpp_fast.native import _host
from diffpp_fast.ops.reward_pixels import axis_matrix
from diffpp_fast.philox import philox4x32

WORD = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    assert " ".join(f"{word:08x}" for word in _host.philox4x32(counter, key)) == answer


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_equals_the_reference(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    expected = philox4x32([torch.tensor([word]) for word in counter], key)
    assert _host.philox4x32(counter, key) == tuple(int(word) for word in expected)


def test_philox_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="philox4x32: counter must have 4 words and key 2"):
        _host.philox4x32((0, 0, 0), (0, 0))


@settings(max_examples=200)
@given(
    in_size=st.integers(1, 300),
    other_in_size=st.integers(1, 300),
    size=st.integers(1, 90),
    fit=st.sampled_from(["crop", "pad", "stretch"]),
    filter=st.sampled_from(["bicubic", "bilinear"]),
    antialias=st.booleans(),
)
def test_tables_are_the_reference_matrices(
    in_size: int, other_in_size: int, size: int, fit: str, filter: str, antialias: bool
) -> None:
    arguments = (in_size, other_in_size, size, fit, filter, antialias)
    expected = axis_matrix(*arguments)
    first, count, weights = _host.axis_table(*arguments)
    table = torch.zeros_like(expected)
    for o in range(size):
        assert len(weights[o]) == count[o]
        table[o, first[o] : first[o] + count[o]] = torch.tensor(weights[o], dtype=torch.float64)
    # The same formula; the order in which a row's weights are summed differs.
    torch.testing.assert_close(table, expected, rtol=2.0**-50, atol=2.0**-60)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        # 5 * 13 / 10 = 6.5 is cut to 6, and the offset (6 - 5) / 2 = 0.5 goes to the even 0.
        ((13, 10, 5, "crop", "bilinear", False), 5),
        # 5 * (5 / 10) = 2.5 goes to the even 2: one row of zeros, 2 rows, two rows of zeros.
        ((5, 10, 5, "pad", "bilinear", False), 2),
        # 7 * (5 / 10) = 3.5 goes to the even 4.
        ((7, 10, 5, "pad", "bilinear", False), 4),
        # Never less than one row.
        ((1, 100, 5, "pad", "bicubic", True), 1),
    ],
)
def test_halves_round_to_even(arguments: tuple[int, int, int, str, str, bool], rows: int) -> None:
    first, count, weights = _host.axis_table(*arguments)
    matrix = axis_matrix(*arguments)
    assert sum(n > 0 for n in count) == rows == int((matrix != 0.0).any(dim=1).sum())
    for o, row in enumerate(weights):
        torch.testing.assert_close(float(sum(row)), float(matrix[o].sum()))
        torch.testing.assert_close(
            float(sum(weight * (first[o] + k) for k, weight in enumerate(row))),
            float(matrix[o] @ torch.arange(arguments[0], dtype=torch.float64)),
        )


def test_table_of_a_kept_size_is_the_identity() -> None:
    for filter in ("bicubic", "bilinear"):
        for antialias in (False, True):
            first, count, weights = _host.axis_table(7, 7, 7, "stretch", filter, antialias)
            assert first == list(range(7)) and count == [1] * 7 and weights == [[1.0]] * 7


def test_tables_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="axis_table: unknown fit 'cover'; known: crop, pad, stretch"):
        _host.axis_table(4, 4, 2, "cover", "bicubic", True)
    with pytest.raises(ValueError, match="axis_table: unknown filter 'box'; known: bilinear, bicubic"):
        _host.axis_table(4, 4, 2, "crop", "box", True)
    with pytest.raises(ValueError, match="axis_table: sizes must be at least 1"):
        _host.axis_table(4, 0, 2, "crop", "bicubic", True)
