"""What ``torch.autocast`` means for attention: operands in its dtype, like ``scaled_dot_product_attention``, sums in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def autocast(function: F) -> F:
    """Under autocast, call ``function`` with its fp32 tensors cast and autocast off. An ``lse`` stays as it is.

    Cast first and checked later, so that tensors of both dtypes may be mixed, as they come out of an autocast model.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        named = {name: _cast(x, dtype, name) for name, x in (*zip(names, args), *kwargs.items())}
        with torch.autocast(device, enabled=False):
            return function(**named)

    names = function.__code__.co_varnames
    return wrapper  # type: ignore[return-value]


def _cast(x: Any, dtype: torch.dtype, name: str) -> Any:
    if isinstance(x, tuple):
        return tuple(_cast(y, dtype, name) for y in x)
    castable = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and name != "lse"
    return x.to(dtype) if castable else x
