// Gradient of the queries of selected attention on Hopper, a warp for each query of 16 heads, or for several neighbouring ones of
// fewer: in the form of selected_forward.cu.
//
// A tile has R queries, and a warp Q of them with all G heads. A pair of a warp and a block reads 48 KB of shared memory, or of keys
// of 192 64 KB: keys, values, and the keys again, turned. So a warp keeps its queries and dO in registers, as many as there are,
// where they come through the ring like the blocks; the room that they would take in shared memory makes the ring longer.
#include "make_lists.cuh"
#include "ring.cuh"

namespace {

constexpr int WARPS = 8, R = WARPS * Q;          // warps that multiply, each for Q of a tile's R queries
constexpr int THREADS = (WARPS + 4) * 32;        // and a warpgroup of which one warp loads
constexpr int STASHED = D > 128 ? 6 : 0;         // fragments of a warp's queries for which there are no registers
constexpr int STASH_BYTES = WARPS * STASHED * FRAGMENT_BYTES;
constexpr int SLOTS = (ROOM - STASH_BYTES) / (K_BYTES + V_BYTES) * 2;  // of the ring: the keys or the values of a block, or
constexpr int LOADS = D == DV ? 1 : 2;           // what SHARE warps' queries need: their dO in the same slot, or in one of its own
constexpr int G_BYTES = ROWS * DV * 2;           // of a warp's dO
constexpr int SHARE = K_BYTES / ROWS_BYTES * LOADS / 2, AHEAD = WARPS / SHARE * LOADS;  // so many come ahead of a tile's blocks
constexpr int STASH = Ring<SLOTS>::BYTES, BARRIERS = STASH + STASH_BYTES;  // where they lie, after the ring

static_assert(SHARE * (LOADS == 1 ? ROWS_BYTES + G_BYTES : ROWS_BYTES) == K_BYTES && AHEAD * SHARE == WARPS * LOADS);
static_assert(LOADS == 1 || (SHARE * G_BYTES == V_BYTES && AHEAD % 2 == 0));
using In = Item<R>;

}  // namespace

// The arguments.
struct Call : Lists {
  const float* shift;     // [B, HQ, rows], of rows' scores, in units of log2; it carries the gate, whose sign is the lowest bit
  const float* delta;     // as shift
  i64 stat_batch, stat_head;  // strides of both
  u16* dq;                // [B, rows, HQ, D] with the strides below
  i64 dq_batch, dq_row, dq_head;
  int add;                // to what dq holds
  float scale, scale2;    // the softmax's, and with log2(e)
  u32 zero;               // 0, which the compiler must not know
};

extern "C" __global__ void __launch_bounds__(LIST_THREADS<R>) selected_lists(const Lists c) { make_lists<R>(c); }

// ---- gradient

namespace {

struct Rows {  // of the warp: 4 neighbouring lanes hold rows lane / 4 and lane / 4 + 8
  float acc[D / 8][4], shift[2], delta[2];
};

struct Left {  // the left operands of a block's first two products
  Operand<D, STASHED> q;
  Operand<DV, 0> g;  // of dO
};

// A block that these queries want, which begins at the sequence's key `key`, into their gradient: load `load` is its keys, the next
// its values. What the tile's head says is taken out of it where it is needed: registers are short.
__device__ __forceinline__ void add_block(Ring<SLOTS>& ring, u32 load, u32 queries, int key, u32 head, Rows& x, const Left& left,
                                          u32 straight, u32 turned, float scale2, int warp, int lane) {
  const u32 k_slot = ring.wait(load), k_tile = ring.tile(k_slot);
  int end = word(head, END) - key;  // keys of the block that are of the sequence
  if (end < SIZE) blank_past<K_BYTES>(k_tile, end, lane);  // the last product takes 0 times these rows
  float p[8][4];
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) p[i][j] = 0;
  product(p, left.q, k_tile + straight);
  float minus[2];  // no probability is left where a row's query doesn't want the block
#pragma unroll
  for (int h = 0; h < 2; h++) minus[h] = is_among(queries, lane, h) ? -x.shift[h] : minus_infinity();
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) p[i][j] = exp2_fast(fmaf(p[i][j], scale2, minus[j >> 1]));
  const int last = word(head, POSITION) + warp * Q - key;  // of the block's keys, that the warp's first query sees
  if (last < SIZE - 1) hide_future(p, last, lane, 0);
  float dp[8][4];  // less delta
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) dp[i][j] = -x.delta[j >> 1];
  const u32 v_slot = ring.wait(load + 1), v_tile = ring.tile(v_slot);
  end = word(head, END) - key;
  if (end < SIZE) blank_past<V_BYTES>(v_tile, end, lane);
  product(dp, left.g, v_tile + straight);
  u32 after = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) after |= __float_as_uint(dp[i][0]);
  ring.leave(v_slot, after, lane);
  u32 ds[1][4][4];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    ds[0][i / 2][i % 2 * 2] = pack(p[i][0] * dp[i][0], p[i][1] * dp[i][1]);
    ds[0][i / 2][i % 2 * 2 + 1] = pack(p[i][2] * dp[i][2], p[i][3] * dp[i][3]);
  }
  add_product<1>(ds, x.acc, x.acc, k_tile + turned);
  after = 0;
#pragma unroll
  for (int i = 0; i < D / 8; i++) after |= __float_as_uint(x.acc[i][0]);
  ring.leave(k_slot, after, lane);
}

// The warp's rows to memory, those of its first `queries` queries; `first` the row of the first of them in its batch. `signs`: bit
// h, whether the gate of row h is negative; `add`, as in the call.
__device__ __forceinline__ void write(const Rows& x, const Call& c, int add, int batch, int first, int queries, int hk, u32 signs,
                                      int lane) {
  const int j = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float scale = signs >> h & 1 ? -c.scale : c.scale;
    const bool stored = Q == 1 || query_of(lane, h) < queries;
    // A row that isn't stored reads what the first query's does: a branch around the loads would cost registers.
    const int head = hk * G + head_of(lane, h), row = first + (stored ? query_of(lane, h) : 0);
    uint4* to = reinterpret_cast<uint4*>(c.dq + batch * c.dq_batch + row * c.dq_row + head * c.dq_head) + j;
    uint4 old[D / 32];
    if (add) {
#pragma unroll
      for (int m = 0; m < D / 32; m++) old[m] = load_once(to + 4 * m);
    }
#pragma unroll
    for (int m = 0; m < D / 32; m++) {  // 32 columns; after the exchange a lane has 8 neighbouring ones
      float sum[4][2];
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int k = 0; k < 2; k++) sum[i][k] = x.acc[4 * m + i][2 * h + k] * scale;
      if (add) {  // what was there goes the other way through the exchange, which is its own inverse: the sum is rounded once
        u32 w[4] = {old[m].x, old[m].y, old[m].z, old[m].w};
        transpose(w, j);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int k = 0; k < 2; k++) sum[i][k] += widen((u16)(w[i] >> 16 * k));
      }
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack(sum[i][0], sum[i][1]);
      transpose(w, j);
      if (stored) store_once(to + 4 * m, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

__device__ __forceinline__ void finish(const Rows& x, const Call& c, int batch, int first, int queries, int hk, u32 signs,
                                       int lane) {
  // Registers that are loaded only at times are held through all of the loop. Where these are too many, the code is there twice.
  if (!STASHED) write(x, c, c.add, batch, first, queries, hk, signs, lane);
  else if (c.add) write(x, c, 1, batch, first, queries, hk, signs, lane);
  else write(x, c, 0, batch, first, queries, hk, signs, lane);
}

// The loads of a tile ahead of its blocks: of each warp's queries their heads in boxes of 64 columns, then those of dO. Past a
// sequence's end come others' rows, and past the tensor's zeros: nobody uses them.
__device__ __forceinline__ void load_queries(Loads<SLOTS>& loads, const TensorMap* q_map, const TensorMap* g_map, u32 head) {
  const int batch = word(head, BATCH), first = word(head, ROW), of = word(head, KV_HEAD) * G;
  for (int row = first; row < first + R; row += SHARE * Q)
    for (int load = 0; load < LOADS; load++)
      loads.next(WARPS - SHARE, load == 0 ? K_BYTES : V_BYTES, [&](u32 to, u32 full) {
        for (int n = 0; n < SHARE; n++)
          for (int i = load; i < 2; to += i ? G_BYTES : ROWS_BYTES, i += LOADS) {
            const int columns = i ? DV : D;
#pragma unroll
            for (int column = 0; column < columns; column += COLUMNS)
              load_box_once(to + column / COLUMNS * ROWS_BOX_BYTES, i ? g_map : q_map, full, column, of, row + n * Q, batch);
          }
      });
}

// What the warp's rows have in `shift` and `delta`, if there is a query.
__device__ __forceinline__ void load_statistics(Rows& x, const Call& c, u32 head, int warp, int lane) {
  const int batch = word(head, BATCH), row = word(head, ROW) + warp * Q, hk = word(head, KV_HEAD);
  const int queries = word(head, QUERIES);
  if (warp * Q >= queries) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (Q > 1 && warp * Q + query_of(lane, h) >= queries) continue;
    const i64 at = batch * c.stat_batch + (hk * G + head_of(lane, h)) * c.stat_head + row + query_of(lane, h);
    x.shift[h] = c.shift[at];
    x.delta[h] = c.delta[at];
  }
}

// The warp's queries and dO out of load `load`, which SHARE warps want, and with LOADS of 2 out of the next.
__device__ __forceinline__ void take_queries(Left& left, Ring<SLOTS>& ring, u32 load, int warp, u32 turned, int lane) {
  u32 slot = ring.wait(load);
  u32 at = ring.tile(slot) + warp % SHARE * (K_BYTES / SHARE), after = 0;
  asm volatile("" : "+r"(at));  // made here, not kept
  at += turned;
#pragma unroll
  for (int d = 0; d < D / 16; d++) {
    left.q.take(d, at);
    if (LOADS == 1) left.g.take(d, at, ROWS_BYTES);
    after |= left.q.bits(d) | (LOADS == 1 ? left.g.bits(d) : 0);
  }
  ring.leave(slot, after, lane);
  if constexpr (LOADS == 1) return;
  slot = ring.wait(load + 1);
  at = ring.tile(slot) + warp % SHARE * G_BYTES + turned;
  after = 0;
#pragma unroll
  for (int d = 0; d < DV / 16; d++) {
    left.g.take(d, at);
    after |= left.g.bits(d);
  }
  ring.leave(slot, after, lane);
}

__device__ __forceinline__ void multiply(Ring<SLOTS>& ring, const Call& c, int warp, int lane) {
  const int items = c.tiles * c.kv_heads;
  const u32 straight = straight_at(lane), turned = turned_at(lane);
  Left left;
  left.q.stash = ring.slots + STASH + warp * (STASHED * FRAGMENT_BYTES) + lane * 16;
  Rows x;
  x.shift[0] = x.shift[1] = x.delta[0] = x.delta[1] = 0;
  u32 first = 0;  // loads of the tiles before
  int i = blockIdx.x;
  u32 head = head_words<R>(c, i, items, lane), next = head_words<R>(c, i + gridDim.x, items, lane);
  Walk<R> walk;
  walk.begin(c, i, warp, lane);
  load_statistics(x, c, head, warp, lane);
  while (i < items) {
#pragma unroll
    for (int d = 0; d < D / 8; d++)
#pragma unroll
      for (int j = 0; j < 4; j++) x.acc[d][j] = 0;
    __syncwarp();
    take_queries(left, ring, first + warp / SHARE * LOADS, warp, turned, lane);
#pragma unroll 1
    for (int e = 0; e < walk.MOST; e++) {
      const auto entry = walk.step(e);
      if (entry.ends()) break;
      const u32 load = first + AHEAD + 2 * entry.place();
      add_block(ring, load, entry.queries(), entry.block() * SIZE, head, x, left, straight, turned, c.scale2, warp, lane);
    }
    __syncwarp();
    const int batch = word(head, BATCH), row = word(head, ROW) + warp * Q, hk = word(head, KV_HEAD);
    const int queries = word(head, QUERIES);
    const bool stored = warp * Q < queries;
    const u32 signs = (__float_as_uint(x.shift[0]) & 1) | (__float_as_uint(x.shift[1]) & 1) << 1;
    first += AHEAD + 2 * word(head, COUNT);
    // What the next tile needs comes while this one's rows are written.
    i += gridDim.x;
    head = next;
    next = head_words<R>(c, i + gridDim.x, items, lane);
    if (i < items) {
      walk.begin(c, i, warp, lane);
      load_statistics(x, c, head, warp, lane);
    }
    if (stored) finish(x, c, batch, row, queries - warp * Q, hk, signs, lane);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
selected_dq(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
            const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap g_map, const __grid_constant__ Call c) {
  extern __shared__ unsigned char memory[];
  Ring<SLOTS> ring(memory, BARRIERS, c.zero);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  ring.begin(WARPS);
  // Registers move only within what the CTA was given: 12 warps of 168.
  if (warp >= WARPS) {
    fewer_registers<24>();
    const auto ahead = [&](Loads<SLOTS>& loads, u32 head) { load_queries(loads, &q_map, &g_map, head); };
    if (warp == WARPS) load_blocks<R, WARPS>(ring, &k_map, &v_map, c, lane, ahead);
  } else {
    more_registers<240>();
    multiply(ring, c, warp, lane);
  }
}
