// Tiles of keys, values and queries in shared memory, and the fragments of them that a warp's products take.
#pragma once
#include "instructions.cuh"

#ifndef GROUP
#define GROUP 16
#endif
#ifndef DIM
#define DIM 128
#endif
#ifndef VALUE_DIM
#define VALUE_DIM DIM
#endif

namespace {

constexpr int D = DIM, DV = VALUE_DIM;        // head dims, of queries and keys and of values
constexpr int G = GROUP, SIZE = 64;           // heads of a group, keys of a selection block
constexpr int ROWS = 16, Q = ROWS / G;        // of a fragment: the heads of so many neighbouring queries, query by query
constexpr int COLUMNS = 64;                   // of a box
constexpr int K_BYTES = SIZE * D * 2, V_BYTES = SIZE * DV * 2, BOX_BYTES = SIZE * COLUMNS * 2;  // of a block's keys, of its values
constexpr int ROWS_BYTES = ROWS * D * 2, ROWS_BOX_BYTES = ROWS * COLUMNS * 2;                    // of a warp's queries
constexpr int FRAGMENT_BYTES = ROWS * 16 * 2;                                                    // of 16 columns of them
static_assert(G * Q == ROWS, "whole queries fill a fragment");
static_assert(D % COLUMNS == 0 && DV % COLUMNS == 0);

// Of the lane's rows, lane / 4 and lane / 4 + 8, row h belongs to this one of the queries, and this head of the group.
__device__ __forceinline__ int query_of(int lane, int h) { return Q == 1 ? 0 : ((lane >> 2) + 8 * h) / G; }
__device__ __forceinline__ int head_of(int lane, int h) { return Q == 1 ? (lane >> 2) + 8 * h : ((lane >> 2) + 8 * h) % G; }
// Whether that query is among these, a bit for each.
__device__ __forceinline__ bool is_among(u32 queries, int lane, int h) { return Q == 1 || (queries >> query_of(lane, h) & 1); }

// A tile is boxes of 64 columns, one behind the other, swizzled. Lanes 8 i to 8 i + 7 give the rows of matrix i of a 16 x 16 piece;
// ^ 32 i goes 16 i columns on within a box.
// Keys, and values that aren't turned: rows 0 to 7 (columns 0 to 7, 8 to 15), then rows 8 to 15.
__device__ __forceinline__ u32 straight_at(int lane) {
  return ((lane >> 4) * 8 + (lane & 7)) * 128 + ((lane >> 3 & 1) ^ (lane & 7)) * 16;
}
// Queries, and what is turned: columns 0 to 7 (rows 0 to 7, 8 to 15), then columns 8 to 15.
__device__ __forceinline__ u32 turned_at(int lane) {
  return ((lane >> 3 & 1) * 8 + (lane & 7)) * 128 + ((lane >> 4) ^ (lane & 7)) * 16;
}

// The left operand of products, C columns of a warp's rows. The last STASHED fragments of it lie in shared memory, where registers
// are too few: each lane stores its own words there, and reads them again for every product.
template <int C, int STASHED>
struct Operand {
  static constexpr int KEPT = C / 16 - STASHED;
  u32 kept[KEPT][4];
  u32 stash;  // the lane's place in it

  // Fragment `d` comes from boxes that lie `past` bytes behind those with the lane's row at `at`, which is turned.
  __device__ __forceinline__ void take(int d, u32 at, int past = 0) {
    const u32 from = (at ^ (d & 3) * 32) + (d >> 2) * ROWS_BOX_BYTES + past;
    if (d < KEPT) {
      load_matrices(kept[d], from);
    } else {
      u32 x[4];
      load_matrices(x, from);
      store_words(stash + (d - KEPT) * FRAGMENT_BYTES, x);
    }
  }
  // Of what was taken, for `Ring::leave`; what was stored has come.
  __device__ __forceinline__ u32 bits(int d) const { return d < KEPT ? kept[d][0] : 0; }
  __device__ __forceinline__ void get(u32 (&x)[4], int d) const {
    if (d >= KEPT) {
      load_words(x, stash + (d - KEPT) * FRAGMENT_BYTES);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = kept[d][i];
    }
  }
};

// s += A B^T; `b_at` at the lane's row of B.
template <int C, int STASHED>
__device__ __forceinline__ void product(float (&s)[SIZE / 8][4], const Operand<C, STASHED>& a, u32 b_at) {
#pragma unroll
  for (int d = 0; d < C / 16; d++) {
    u32 left[4];
    a.get(left, d);
#pragma unroll
    for (int keys = 0; keys < SIZE / 16; keys++) {
      u32 b[4];
      load_matrices(b, (b_at ^ (d & 3) * 32) + (d >> 2) * BOX_BYTES + keys * 2048);
      multiply_add(s[2 * keys], left, b[0], b[1]);
      multiply_add(s[2 * keys + 1], left, b[2], b[3]);
    }
  }
}

// Of scores or probabilities, those of keys that their query doesn't see become `hidden`: the first query sees the block's keys to
// `last`, the next ones more by one each.
__device__ __forceinline__ void hide_future(float (&s)[SIZE / 8][4], int last, int lane, float hidden) {
#pragma unroll
  for (int i = 0; i < SIZE / 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (i * 8 + (lane & 3) * 2 + (j & 1) > last + query_of(lane, j >> 1)) s[i][j] = hidden;
}

// x += p[0] B and, of two queries, y += p[1] B; `b_at` at the lane's row of B, which is turned and has 8 C columns.
template <int N, int C>
__device__ __forceinline__ void add_product(const u32 (&p)[N][SIZE / 16][4], float (&x)[C][4], float (&y)[C][4], u32 b_at) {
#pragma unroll
  for (int keys = 0; keys < SIZE / 16; keys++)
#pragma unroll
    for (int d = 0; d < C / 2; d++) {
      u32 b[4];
      load_turned(b, (b_at ^ (d & 3) * 32) + (d >> 2) * BOX_BYTES + keys * 2048);
#pragma unroll
      for (int n = 0; n < N; n++) {
        float(&to)[C][4] = n == 0 ? x : y;
        multiply_add(to[2 * d], p[n][keys], b[0], b[1]);
        multiply_add(to[2 * d + 1], p[n][keys], b[2], b[3]);
      }
    }
}

// Zero the rows of a tile of so many BYTES from row `end` on: 0 times the NaN that may follow a sequence is not 0. All warps that
// want the block do so, each before it reads; they write the same.
template <int BYTES>
__device__ __forceinline__ void blank_past(u32 tile, int end, int lane) {
  for (int i = end * 8 + lane; i < SIZE * 8; i += 32) {
#pragma unroll
    for (int box = 0; box < BYTES; box += BOX_BYTES) store_zeros(tile + box + i * 16);
  }
  writes_before_loads();  // the slot's next load comes behind these writes
  __syncwarp();
}

// 4 x 4 words among 4 lanes: out[i] of lane j = in[j] of lane i.
__device__ __forceinline__ void transpose(u32 (&x)[4], int j) {
#pragma unroll
  for (int h = 1; h <= 2; h *= 2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int a = h == 1 ? 2 * i : i, b = a + h;
      const bool up = j & h;
      const u32 other = __shfl_xor_sync(~0u, up ? x[a] : x[b], h);
      if (up) x[a] = other; else x[b] = other;
    }
  }
}

}  // namespace
