// Selected attention on Hopper, a warp for two queries: what a query did not select is not computed for it.
//
// A tile is R neighbouring queries of a KV head, all G heads of each. The blocks that any of them selected come once, through a ring
// in shared memory; each warp walks its own list of them and never touches the others. Reading keys and values from shared memory is
// what bounds this (16 rows a fragment), so a warp has two queries: where both want a block they share its fragments.
//
// One CTA a multiprocessor goes from tile to tile, and its warps run over a tile's end on their own: nothing waits for all of them.
#include "softmax.cuh"

namespace {

constexpr int R = 16, WARPS = 8, PAIR = 2;       // queries of a tile, warps that multiply, queries of each
constexpr int THREADS = (WARPS + 4) * 32;        // and a warpgroup of which one warp loads
constexpr int SLOTS = 10;                        // of the ring, each the keys or the values of a block
constexpr int BARRIERS = SLOTS * TILE_BYTES + R * QUERY_BYTES;  // where they lie, after the ring and the queries

static_assert(R == WARPS * PAIR);
using In = Item<R>;

}  // namespace

extern "C" __global__ void __launch_bounds__(R * WIDTH) selected_lists(const Lists c) { make_lists<R, PAIR>(c); }

// ---- attention

namespace {

// s = Q K^T of N queries. `q_at` and `k_at` at the lane's row; ^ 32 i goes 16 i columns on within the 64 of a swizzled box.
template <int N>
__device__ __forceinline__ void scores(float (&s)[N][8][4], const u32 (&q_at)[PAIR], u32 k_at) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) s[n][i][j] = 0;
#pragma unroll
  for (int d = 0; d < D / 16; d++) {
    u32 a[N][4];
#pragma unroll
    for (int n = 0; n < N; n++) load_matrices(a[n], (q_at[n] ^ (d & 3) * 32) + (d >> 2) * (QUERY_BYTES / 2));
#pragma unroll
    for (int keys = 0; keys < SIZE / 16; keys++) {
      u32 b[4];
      load_matrices(b, (k_at ^ (d & 3) * 32) + (d >> 2) * (TILE_BYTES / 2) + keys * 2048);
#pragma unroll
      for (int n = 0; n < N; n++) {
        multiply_add(s[n][2 * keys], a[n], b[0], b[1]);
        multiply_add(s[n][2 * keys + 1], a[n], b[2], b[3]);
      }
    }
  }
}

// A block into N queries' rows: of its keys the first query sees those to `last`, the second one more. Before key `end` they are of
// the sequence.
template <int N>
__device__ __forceinline__ void attend(Ring<SLOTS>& ring, u32 load, int last, int end, Rows& x, Rows& y, const u32 (&q_at)[PAIR],
                                       u32 straight, u32 turned, float scale, int lane) {
  float s[N][8][4];
  u32 slot = ring.wait(load);
  scores<N>(s, q_at, ring.slots + slot * TILE_BYTES + straight);
  u32 after = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) after |= __float_as_uint(s[N - 1][i][0]);
  ring.leave(slot, after, lane);
  if (last < SIZE - 1) {
#pragma unroll
    for (int n = 0; n < N; n++) hide_future(s[n], last + n, lane, minus_infinity());
  }
  u32 p[N][4][4];
  soften(s[0], p[0], x, scale);
  if constexpr (N == 2) soften(s[1], p[1], y, scale);
  slot = ring.wait(load + 1);
  if (end < SIZE) blank_past(ring.slots + slot * TILE_BYTES, end, lane);
  add_product<N>(p, x.acc, y.acc, ring.slots + slot * TILE_BYTES + turned);
  after = 0;
#pragma unroll
  for (int i = 0; i < D / 8; i++) after |= __float_as_uint((N == 2 ? y : x).acc[i][0]);
  ring.leave(slot, after, lane);
}

// The queries of warp `warp` to `to`, as boxes of 64 columns swizzled like those of keys.
__device__ __forceinline__ void load_queries(u32 to, const Call& c, u32 head, int warp, int lane) {
  const int batch = word(head, BATCH), row = word(head, ROW) + warp * PAIR, hk = word(head, KV_HEAD);
  const int left = word(head, QUERIES) - warp * PAIR;
  const u16* from = c.q + batch * c.q_batch + row * c.q_row + (hk * G + (lane >> 4)) * c.q_head + (lane & 15) * 8;
  to += (lane >> 3 & 1) * (QUERY_BYTES / 2) + (lane >> 4) * 128 + (((lane & 7) ^ (lane >> 4)) << 4);
  asm volatile("" : "+r"(to));  // made here, not kept
#pragma unroll
  for (int n = 0; n < PAIR; n++) {
    if (n >= left) break;
#pragma unroll
    for (int i = 0; i < G / 2; i++)  // heads 2 i and 2 i + 1
      copy_16((to ^ (i & 3) * 32) + n * QUERY_BYTES + i * 256, from + n * c.q_row + 2 * i * c.q_head);
  }
}

__device__ __forceinline__ void multiply(Ring<SLOTS>& ring, u32 queries, const Call& c, int warp, int lane) {
  const int items = c.tiles * c.kv_heads;
  const u32 straight = straight_at(lane), turned = turned_at(lane);
  queries += warp * (PAIR * QUERY_BYTES);
  const u32 q_at[PAIR] = {queries + turned, queries + QUERY_BYTES + turned};
  const u32 second_at[PAIR] = {q_at[1], q_at[1]};
  Rows x, y;
  u32 first = 0;  // blocks of the tiles before
  int i = blockIdx.x;
  u32 head = head_of<R>(c, i, items, lane), next = head_of<R>(c, i + gridDim.x, items, lane);
  u32 list = c.lists[(i64)i * In::WORDS + In::OWN + warp * 32 + lane];
  load_queries(queries, c, head, warp, lane);
  while (i < items) {
    reset(x);
    reset(y);
    copies_wait();
    __syncwarp();
    const int position = word(head, POSITION) + warp * PAIR, k_len = word(head, END);
    const int entries = __popc(__ballot_sync(~0u, list != 0));
    for (int e = 0; e < entries; e++) {
      const u32 entry = __shfl_sync(~0u, list, e);
      const u32 load = 2 * (first + (entry >> 20 & 0x1ff)), which = entry >> 29;
      const int key = (int)(entry & 0xfffff) * SIZE, last = position - key, end = k_len - key;
      if (which == 3) {
        attend<2>(ring, load, last, end, x, y, q_at, straight, turned, c.scale, lane);
      } else if (which == 1) {
        attend<1>(ring, load, last, end, x, x, q_at, straight, turned, c.scale, lane);
      } else {
        attend<1>(ring, load, last + 1, end, y, y, second_at, straight, turned, c.scale, lane);
      }
    }
    __syncwarp();
    const int batch = word(head, BATCH), row = word(head, ROW) + warp * PAIR, hk = word(head, KV_HEAD);
    const int left = word(head, QUERIES) - warp * PAIR;
    first += word(head, COUNT);
    // What the next tile needs comes while this one's rows are written.
    i += gridDim.x;
    head = next;
    next = head_of<R>(c, i + gridDim.x, items, lane);
    if (i < items) {
      list = c.lists[(i64)i * In::WORDS + In::OWN + warp * 32 + lane];
      load_queries(queries, c, head, warp, lane);
    }
    if (left > 0) finish(x, c, batch, row, hk, lane);
    if (left > 1) finish(y, c, batch, row + 1, hk, lane);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
selected_forward(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const __grid_constant__ Call c) {
  extern __shared__ unsigned char memory[];
  Ring<SLOTS> ring(memory, BARRIERS, c.zero);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  ring.begin(WARPS);
  // Registers move only within what the CTA was given: 12 warps of 168.
  if (warp >= WARPS) {
    fewer_registers<24>();
    if (warp == WARPS) load_blocks<R, WARPS>(ring, &k_map, &v_map, c, lane, [](Loads<SLOTS>&, u32) {});
  } else {
    more_registers<240>();
    multiply(ring, ring.slots + SLOTS * TILE_BYTES, c, warp, lane);
  }
}
