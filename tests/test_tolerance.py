"""The rule by which kernels are judged must itself be able to say no, and where."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import assert_within_2x

REF = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_passes(dtype: torch.dtype) -> None:
    assert_within_2x("o", REF.to(dtype), REF, REF.to(dtype), dtype)


def test_first_and_worst_coordinates_are_named() -> None:
    got = REF.clone()
    got[0, 2, 1] += 0.1
    got[1, 0, 3] += 0.2
    with pytest.raises(AssertionError, match=r"dq: 2 of 24 wrong .*first at \[0, 2, 1\].*worst at \[1, 0, 3\]"):
        assert_within_2x("dq", got, REF, REF, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    got = REF.clone()
    got[1, 1, 1] = value
    with pytest.raises(AssertionError, match=r"1 of 24 wrong .*finite.*first at \[1, 1, 1\]"):
        assert_within_2x("o", got, REF, got, torch.bfloat16)


def test_an_infinity_must_be_met() -> None:
    ref = REF.clone()
    ref[0, 0, 0] = -torch.inf
    assert_within_2x("lse", ref, ref, ref, torch.float32)
    with pytest.raises(AssertionError, match="1 of 24 wrong"):
        assert_within_2x("lse", REF, ref, ref, torch.float32)


def test_a_bad_naive_result_does_not_excuse_a_large_norm() -> None:
    with pytest.raises(AssertionError, match="error of norm"):
        assert_within_2x("o", REF * 1.1, REF, REF * 2, torch.float16)
