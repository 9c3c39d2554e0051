// What the kernels of the selected branch's forward have in common: their arguments, the softmax of a query's rows, and how these
// are written.
#pragma once
#include "ring.cuh"

namespace {

constexpr float LN2 = 0.6931471805599453f;
constexpr float LAZY = 8;                        // the maximum in use may be 2^8 too low: no probability is over 256

}  // namespace

// The arguments.
struct Call : Lists {
  const u16* q;           // [B, rows, HQ, D] with the strides below
  i64 q_batch, q_row, q_head;
  u16* o;                 // [B, rows, HQ, D], or null
  float* lse;             // [B, HQ, rows]
  u16* mixed;             // [B, rows, HQ, D], the gated sum, or null: then so are the next three
  const u16* o_cmp;       // as o
  const u16* o_win;       // as o
  const void* gates;      // [B, rows, HQ, 3]
  int wide_gates;         // fp32, else of q's type
  float scale;            // with log2(e)
  u32 zero;               // 0, which the compiler must not know
};

namespace {

struct Rows {  // of a query, its G heads: 4 neighbouring lanes hold rows lane / 4 and lane / 4 + 8
  float acc[D / 8][4], m[2], l[2];  // l of the lane's own columns
};

__device__ __forceinline__ void reset(Rows& x) {
#pragma unroll
  for (int i = 0; i < D / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) x.acc[i][j] = 0;
  x.m[0] = x.m[1] = minus_infinity();
  x.l[0] = x.l[1] = 0;
}

// Scores of a block to probabilities, as left operands of the products with its values. Only where the maximum of a row grew by more
// than LAZY is it taken over, with all that it costs: exchange between lanes and rescaling.
__device__ __forceinline__ void soften(float (&s)[8][4], u32 (&p)[4][4], Rows& x, float scale) {
  float a = s[0][0], b = s[0][2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    a = fmaxf(a, fmaxf(s[i][0], s[i][1]));
    b = fmaxf(b, fmaxf(s[i][2], s[i][3]));
  }
  a *= scale;
  b *= scale;
  if (__any_sync(~0u, a > x.m[0] + LAZY || b > x.m[1] + LAZY)) {
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    b = fmaxf(b, __shfl_xor_sync(~0u, b, 1));
    a = fmaxf(fmaxf(a, __shfl_xor_sync(~0u, a, 2)), x.m[0]);
    b = fmaxf(fmaxf(b, __shfl_xor_sync(~0u, b, 2)), x.m[1]);
    const float less_a = exp2_fast(x.m[0] - a), less_b = exp2_fast(x.m[1] - b);
    x.m[0] = a;
    x.m[1] = b;
    x.l[0] *= less_a;
    x.l[1] *= less_b;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      x.acc[i][0] *= less_a;
      x.acc[i][1] *= less_a;
      x.acc[i][2] *= less_b;
      x.acc[i][3] *= less_b;
    }
  }
  const float minus_a = -x.m[0], minus_b = -x.m[1];
  float sum_a[2] = {0, 0}, sum_b[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      s[i][j] = exp2_fast(fmaf(s[i][j], scale, minus_a));
      s[i][2 + j] = exp2_fast(fmaf(s[i][2 + j], scale, minus_b));
      sum_a[j] += s[i][j];
      sum_b[j] += s[i][2 + j];
    }
    p[i / 2][i % 2 * 2] = pack_here(s[i][0], s[i][1]);
    p[i / 2][i % 2 * 2 + 1] = pack_here(s[i][2], s[i][3]);
  }
  x.l[0] += sum_a[0] + sum_a[1];
  x.l[1] += sum_b[0] + sum_b[1];
}

__device__ __forceinline__ float gate(const Call& c, i64 i) {
  return c.wide_gates ? static_cast<const float*>(c.gates)[i] : widen(static_cast<const u16*>(c.gates)[i]);
}

// What the branches give to 2 neighbouring columns; this one's rounded, as it would be were it written and read.
__device__ __forceinline__ u32 mix(u32 cmp, u32 slc, u32 win, const float (&g)[3]) {
  float sum[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    sum[i] = g[0] * widen((u16)(cmp >> 16 * i)) + g[1] * widen((u16)(slc >> 16 * i)) + g[2] * widen((u16)(win >> 16 * i));
  return pack(sum[0], sum[1]);
}

// A query's rows to memory; `row` of it in its batch.
__device__ __forceinline__ void finish(const Rows& x, const Call& c, int batch, int row, int hk, int lane) {
  const int j = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float l = x.l[h];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    const float inverse = l > 0 ? 1.0f / l : 0.0f;
    const int head = hk * G + (lane >> 2) + 8 * h;
    if (j == 0) c.lse[((i64)batch * c.heads + head) * c.rows + row] = l > 0 ? (x.m[h] + log2_fast(l)) * LN2 : minus_infinity();
    const i64 at = ((i64)batch * c.rows + row) * c.heads + head;
    float g[3] = {0, 0, 0};
    if (c.mixed) {
#pragma unroll
      for (int i = 0; i < 3; i++) g[i] = gate(c, at * 3 + i);
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {  // 32 columns; after the exchange a lane has 8 neighbouring ones
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack(x.acc[4 * m + i][2 * h] * inverse, x.acc[4 * m + i][2 * h + 1] * inverse);
      transpose(w, j);
      const i64 word = at * (D / 8) + 4 * m + j;
      if (c.o) reinterpret_cast<uint4*>(c.o)[word] = make_uint4(w[0], w[1], w[2], w[3]);
      if (c.mixed) {
        const uint4 a = reinterpret_cast<const uint4*>(c.o_cmp)[word], b = reinterpret_cast<const uint4*>(c.o_win)[word];
        reinterpret_cast<uint4*>(c.mixed)[word] =
            make_uint4(mix(a.x, w[0], b.x, g), mix(a.y, w[1], b.y, g), mix(a.z, w[2], b.z, g), mix(a.w, w[3], b.w, g));
      }
    }
  }
}

}  // namespace
