"""When a low-precision result is right: at most twice the error of a naive implementation in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
RELATIVE_NORM = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def assert_within_2x(name: str, got: Tensor, ref: Tensor, naive: Tensor, dtype: torch.dtype) -> None:
    """``max|got - ref| <= 2 max|naive - ref| + floor max|ref|``, and ``|got - ref| / |ref|`` under the dtype's bound.

    ``ref`` is the fp64 result on the same inputs, ``naive`` that of ``tests/naive.py`` in ``dtype``, which is the dtype of the
    inputs (``got`` may be wider: lse is). An infinity must be met by the same infinity; NaN is always wrong.
    """
    assert got.shape == ref.shape == naive.shape, f"{name}: shapes {[*got.shape]}, {[*ref.shape]}, {[*naive.shape]} differ"
    got, ref, naive = (x.detach().double().cpu() for x in (got, ref, naive))
    infinite = ref.isinf()
    unmet = got.isnan() | ((got != ref) & (infinite | got.isinf()))
    _fail_where(name, got, ref, unmet, "must be finite where the reference is")
    got, ref, naive = (x.masked_fill(infinite, 0) for x in (got, ref, naive))
    if ref.numel() == 0:
        return
    error = (got - ref).abs()
    allowed = float(2 * (naive - ref).abs().nan_to_num().max() + FLOOR[dtype] * ref.abs().max())
    _fail_where(name, got, ref, error > allowed, f"allowed {allowed:.3g}")
    norm, size = float(error.norm()), float(ref.norm())
    assert norm <= RELATIVE_NORM[dtype] * size, (
        f"{name}: error of norm {norm:.3g} beside a reference of norm {size:.3g} in {dtype}"
    )


def _fail_where(name: str, got: Tensor, ref: Tensor, wrong: Tensor, rule: str) -> None:
    """Say how many are wrong, and where the first and the worst lie."""
    if not wrong.any():
        return
    first = wrong.nonzero()[0].tolist()
    error = (got - ref).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(~wrong, -1)
    worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    told = "; ".join(
        f"{which} at {where}: got {got[tuple(where)]:.6g}, reference {ref[tuple(where)]:.6g}"
        for which, where in (("first", first), ("worst", worst))
    )
    raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong ({rule}). {told}")
