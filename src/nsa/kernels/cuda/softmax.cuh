// The running softmax of a warp's 16 rows, and the products that go into it.
#pragma once
#include "tiles.cuh"

namespace {

constexpr float LAZY = 8;  // the maximum in use may be 2^8 too low: no probability is over 256

struct Rows {  // of a warp: 4 neighbouring lanes hold rows lane / 4 and lane / 4 + 8
  float acc[DV / 8][4], m[2], l[2];  // l of the lane's own columns
};

__device__ __forceinline__ void reset(Rows& x) {
#pragma unroll
  for (int i = 0; i < DV / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) x.acc[i][j] = 0;
  // With several queries, blocks of others may come ahead of a row's first: till then its maximum is subtracted from itself.
  x.m[0] = x.m[1] = Q == 1 ? minus_infinity() : -3e38f;
  x.l[0] = x.l[1] = 0;
}

// Scores of a block to probabilities, as left operands of the products with its values; 0 in rows of queries that don't want it. Only
// where the maximum of a row grew by more than LAZY is it taken over, with all that it costs: exchange between lanes and rescaling.
__device__ __forceinline__ void soften(float (&s)[8][4], u32 (&p)[4][4], Rows& x, float scale, u32 queries, int lane) {
  float a = s[0][0], b = s[0][2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    a = fmaxf(a, fmaxf(s[i][0], s[i][1]));
    b = fmaxf(b, fmaxf(s[i][2], s[i][3]));
  }
  const bool want_a = is_among(queries, lane, 0), want_b = is_among(queries, lane, 1);
  a = want_a ? a * scale : minus_infinity();
  b = want_b ? b * scale : minus_infinity();
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
    for (int i = 0; i < DV / 8; i++) {
      x.acc[i][0] *= less_a;
      x.acc[i][1] *= less_a;
      x.acc[i][2] *= less_b;
      x.acc[i][3] *= less_b;
    }
  }
  const float minus_a = want_a ? -x.m[0] : minus_infinity(), minus_b = want_b ? -x.m[1] : minus_infinity();
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

}  // namespace
