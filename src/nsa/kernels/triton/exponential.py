"""Powers of two of which some are taken by multiply-adds, where the unit that takes them is what a kernel waits for."""

from __future__ import annotations

import triton
import triton.language as tl

# Of x = n + f, |f| <= 1/2, 2^f by the polynomial of degree 5 whose greatest relative error is least among those that are 1 at
# 0: 9.1e-8 before rounding. n is added to its exponent. The sum with 1.5 * 2^23 is rounded to whole numbers, the lowest bits of
# which are n. From -127 on down it is 0.
_POLYNOMIAL = """
    max.f32 x, {x}, 0fC2FE0000;
    add.rn.f32 n, x, 0f4B400000;
    sub.rn.f32 f, n, 0f4B400000;
    sub.rn.f32 f, x, f;
    fma.rn.f32 y, f, 0f3AADDD0A, 0f3C1E7544;
    fma.rn.f32 y, f, y, 0f3D635BA9;
    fma.rn.f32 y, f, y, 0f3E75FCDE;
    fma.rn.f32 y, f, y, 0f3F317215;
    fma.rn.f32 y, f, y, 0f3F800000;
    mov.b32 i, y;
    mov.b32 m, n;
    shl.b32 m, m, 23;
    add.s32 i, i, m;
    mov.b32 {y}, i;
"""


def _mixed(count: int) -> str:
    taken = [f"ex2.approx.ftz.f32 ${i}, ${i + count};" for i in range(count - 1)]
    polynomial = _POLYNOMIAL.format(x=f"${2 * count - 1}", y=f"${count - 1}")
    return "{\n.reg .f32 x, n, f, y;\n.reg .b32 i, m;\n" + "\n".join(taken) + polynomial + "}"


OF_2, OF_4 = tl.constexpr(_mixed(2)), tl.constexpr(_mixed(4))


@triton.jit
def mixed_exp2(x, MIX: tl.constexpr):
    """``2 ** x`` of fp32 to 127, one number of ``MIX`` (2 or 4; 0: none) by multiply-adds, within 2.5e-7 of it."""
    if MIX == 4:
        return tl.inline_asm_elementwise(OF_4, "=f,=f,=f,=f,f,f,f,f", [x], dtype=tl.float32, is_pure=True, pack=4)
    elif MIX == 2:
        return tl.inline_asm_elementwise(OF_2, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return tl.exp2(x)
