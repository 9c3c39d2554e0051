// Selected attention on Hopper, a warp for each query: what a query did not select is not computed for it.
//
// A tile is R neighbouring queries of a KV head, all G heads of each. The blocks that any of them selected come once, through a ring
// in shared memory; each warp walks its own list of them and never touches the others. The queries come through the ring as well, and
// stay in registers: that leaves room for a longer ring, and spares every block the reading of its left operand.
//
// One CTA a multiprocessor goes from tile to tile, and its warps run over a tile's end on their own: nothing waits for all of them.
#include "softmax.cuh"

namespace {

constexpr int R = 12, WARPS = 12;                // queries of a tile, warps that multiply, each for one query
constexpr int THREADS = (WARPS + 4) * 32;        // and a warpgroup of which one warp loads
constexpr int SLOTS = 14;                        // of the ring, each the keys or the values of a block, or SHARE queries
constexpr int SHARE = TILE_BYTES / QUERY_BYTES, AHEAD = R / SHARE;  // and so many of these come ahead of a tile's blocks
constexpr int BARRIERS = SLOTS * TILE_BYTES;     // where they lie, after the ring

static_assert(R == WARPS && AHEAD * SHARE == R);
using In = Item<R>;

}  // namespace

extern "C" __global__ void __launch_bounds__(R * WIDTH) selected_lists(const Lists c) { make_lists<R, 1>(c); }

namespace {

struct Query {
  u32 q[D / 16][4];
};

__device__ __forceinline__ void scores(float (&s)[8][4], const Query& left, u32 k_at) {
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[i][j] = 0;
#pragma unroll
  for (int d = 0; d < D / 16; d++)
#pragma unroll
    for (int keys = 0; keys < SIZE / 16; keys++) {
      u32 b[4];
      load_matrices(b, (k_at ^ (d & 3) * 32) + (d >> 2) * (TILE_BYTES / 2) + keys * 2048);
      multiply_add(s[2 * keys], left.q[d], b[0], b[1]);
      multiply_add(s[2 * keys + 1], left.q[d], b[2], b[3]);
    }
}

// A block, of whose keys the query sees those to `last`, and those before `end` are of the sequence, into the query's rows.
__device__ __forceinline__ void attend(Ring<SLOTS>& ring, u32 load, int last, int end, Rows& x, const Query& left, u32 straight,
                                       u32 turned, float scale, int lane) {
  float s[8][4];
  u32 slot = ring.wait(load);
  scores(s, left, ring.slots + slot * TILE_BYTES + straight);
  u32 after = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) after |= __float_as_uint(s[i][0]);
  ring.leave(slot, after, lane);
  if (last < SIZE - 1) hide_future(s, last, lane, minus_infinity());
  u32 p[1][4][4];
  soften(s, p[0], x, scale);
  slot = ring.wait(load + 1);
  if (end < SIZE) blank_past(ring.slots + slot * TILE_BYTES, end, lane);
  add_product<1>(p, x.acc, x.acc, ring.slots + slot * TILE_BYTES + turned);
  after = 0;
#pragma unroll
  for (int i = 0; i < D / 8; i++) after |= __float_as_uint(x.acc[i][0]);
  ring.leave(slot, after, lane);
}

// The loads of a tile ahead of its blocks: of each query its heads in boxes of 64 columns. Past a sequence's end come others' rows,
// and past the tensor's zeros: nobody uses them.
__device__ __forceinline__ void load_queries(Loads<SLOTS>& loads, const TensorMap* q_map, u32 head) {
  const int batch = word(head, BATCH), first = word(head, ROW), of = word(head, KV_HEAD) * G;
  for (int row = first; row < first + R; row += SHARE)
    loads.next(WARPS - SHARE, [&](u32 to, u32 full) {
      for (int n = 0; n < SHARE; n++, to += QUERY_BYTES) {
        load_box(to, q_map, full, 0, of, row + n, batch);
        load_box(to + QUERY_BYTES / 2, q_map, full, D / 2, of, row + n, batch);
      }
    });
}

__device__ __forceinline__ void take_query(Query& left, Ring<SLOTS>& ring, u32 load, int warp, u32 turned, int lane) {
  const u32 slot = ring.wait(load);
  u32 at = ring.slots + slot * TILE_BYTES + warp % SHARE * QUERY_BYTES, after = 0;
  asm volatile("" : "+r"(at));  // made here, not kept
  at += turned;
#pragma unroll
  for (int d = 0; d < D / 16; d++) {
    load_matrices(left.q[d], (at ^ (d & 3) * 32) + (d >> 2) * (QUERY_BYTES / 2));
    after |= left.q[d][0];
  }
  ring.leave(slot, after, lane);
}

__device__ __forceinline__ u32 own_list(const Call& c, int i, int warp, int lane) {
  return lane < WIDTH ? c.lists[(i64)i * In::WORDS + In::OWN + warp * WIDTH + lane] : 0;
}

__device__ __forceinline__ void multiply(Ring<SLOTS>& ring, const Call& c, int warp, int lane) {
  const int items = c.tiles * c.kv_heads;
  const u32 straight = straight_at(lane), turned = turned_at(lane);
  Query left;
  Rows x;
  u32 first = 0;  // loads of the tiles before
  int i = blockIdx.x;
  u32 head = head_of<R>(c, i, items, lane), next = head_of<R>(c, i + gridDim.x, items, lane);
  u32 list = own_list(c, i, warp, lane);
  while (i < items) {
    reset(x);
    __syncwarp();
    take_query(left, ring, first + warp / SHARE, warp, turned, lane);
    const int position = word(head, POSITION) + warp, k_len = word(head, END);
#pragma unroll 1
    for (int e = 0; e < WIDTH; e++) {
      const u32 entry = __shfl_sync(~0u, list, e);
      if (entry == 0) break;
      const int key = (int)(entry & 0xfffff) * SIZE;
      attend(ring, first + AHEAD + 2 * (entry >> 20 & 0x1ff), position - key, k_len - key, x, left, straight, turned, c.scale, lane);
    }
    __syncwarp();
    const int batch = word(head, BATCH), row = word(head, ROW) + warp, hk = word(head, KV_HEAD);
    const bool stored = warp < word(head, QUERIES);
    first += AHEAD + 2 * word(head, COUNT);
    // What the next tile needs comes while this one's rows are written.
    i += gridDim.x;
    head = next;
    next = head_of<R>(c, i + gridDim.x, items, lane);
    if (i < items) list = own_list(c, i, warp, lane);
    if (stored) finish(x, c, batch, row, hk, lane);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
selected_forward_alone(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                       const __grid_constant__ TensorMap q_map, const __grid_constant__ Call c) {
  extern __shared__ unsigned char memory[];
  Ring<SLOTS> ring(memory, BARRIERS, c.zero);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  ring.begin(WARPS);
  // Registers move only within what the CTA was given: 16 warps of 128.
  if (warp >= WARPS) {
    fewer_registers<24>();
    const auto ahead = [&](Loads<SLOTS>& loads, u32 head) { load_queries(loads, &q_map, head); };
    if (warp == WARPS) load_blocks<R, WARPS>(ring, &k_map, &v_map, c, lane, ahead);
  } else {
    more_registers<160>();
    multiply(ring, c, warp, lane);
  }
}
