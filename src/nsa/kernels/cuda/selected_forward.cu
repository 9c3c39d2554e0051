// Selected attention on Hopper, a warp for each query of 16 heads: what a query did not select is not computed for it. Of smaller
// groups a warp has several neighbouring queries, whose heads are its 16 rows: what none of them selected is not computed.
//
// A tile is R neighbouring queries of a KV head, all G heads of each. The blocks that any of them selected come once, through a ring
// in shared memory; each warp walks its own list of them and never touches the others. The queries come through the ring as well, and
// stay in registers: that leaves room for a longer ring, and spares every block the reading of its left operand. Of keys of 192 a
// third of them has no registers, and stays in shared memory.
//
// One CTA a multiprocessor goes from tile to tile, and its warps run over a tile's end on their own: nothing waits for all of them.
#include "make_lists.cuh"
#include "ring.cuh"
#include "softmax.cuh"

namespace {

constexpr int WARPS = 12, R = WARPS * Q;         // warps that multiply, each for Q of a tile's R queries
constexpr int THREADS = (WARPS + 4) * 32;        // and a warpgroup of which one warp loads
constexpr int STASHED = D > 128 ? 4 : 0;         // fragments of a warp's queries for which there are no registers
constexpr int STASH_BYTES = WARPS * STASHED * FRAGMENT_BYTES;
constexpr int SLOTS = (ROOM - STASH_BYTES) / (K_BYTES + V_BYTES) * 2;  // of the ring: the keys or the values of a block, or the
constexpr int SHARE = V_BYTES / ROWS_BYTES, AHEAD = WARPS / SHARE;     // queries of SHARE warps: so many ahead of a tile's blocks
constexpr int STASH = Ring<SLOTS>::BYTES, BARRIERS = STASH + STASH_BYTES;  // where they lie, after the ring
constexpr float LN2 = 0.6931471805599453f;

static_assert(AHEAD * SHARE == WARPS && (D == DV || AHEAD % 2 == 0));
using In = Item<R>;

}  // namespace

// The arguments.
struct Call : Lists {
  const u16* q;           // [B, rows, HQ, D] with the strides below
  i64 q_batch, q_row, q_head;
  u16* o;                 // [B, rows, HQ, DV], or null
  float* lse;             // [B, HQ, rows]
  u16* mixed;             // [B, rows, HQ, DV], the gated sum, or null: then so are the next three
  const u16* o_cmp;       // as o
  const u16* o_win;       // as o
  const void* gates;      // [B, rows, HQ, 3]
  int wide_gates;         // fp32, else of q's type
  float scale;            // with log2(e)
  u32 zero;               // 0, which the compiler must not know
};

extern "C" __global__ void __launch_bounds__(LIST_THREADS<R>) selected_lists(const Lists c) { make_lists<R>(c); }

// ---- attention

namespace {

using Left = Operand<D, STASHED>;

// A block that these queries want, of whose keys the warp's first sees those to `last`, and those before `end` are of the sequence,
// into the warp's rows.
__device__ __forceinline__ void attend(Ring<SLOTS>& ring, u32 load, u32 queries, int last, int end, Rows& x, const Left& left,
                                       u32 straight, u32 turned, float scale, int lane) {
  float s[8][4];
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[i][j] = 0;
  u32 slot = ring.wait(load);
  product(s, left, ring.tile(slot) + straight);
  u32 after = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) after |= __float_as_uint(s[i][0]);
  ring.leave(slot, after, lane);
  if (last < SIZE - 1) hide_future(s, last, lane, minus_infinity());
  u32 p[1][4][4];
  soften(s, p[0], x, scale, queries, lane);
  slot = ring.wait(load + 1);
  if (end < SIZE) blank_past<V_BYTES>(ring.tile(slot), end, lane);
  add_product<1>(p, x.acc, x.acc, ring.tile(slot) + turned);
  after = 0;
#pragma unroll
  for (int i = 0; i < DV / 8; i++) after |= __float_as_uint(x.acc[i][0]);
  ring.leave(slot, after, lane);
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

// The warp's rows to memory, those of its first `queries` queries; `first` the row of the first of them in its batch.
template <bool MIX>
__device__ __forceinline__ void write(const Rows& x, const Call& c, int batch, int first, int queries, int hk, int lane) {
  const int j = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const bool stored = Q == 1 || query_of(lane, h) < queries;
    // A row that isn't stored reads what the first query's does: a branch around the loads would cost registers.
    const int head = hk * G + head_of(lane, h), row = first + (stored ? query_of(lane, h) : 0);
    const i64 at = ((i64)batch * c.rows + row) * c.heads + head, word = at * (DV / 8) + j;
    uint4 cmp[DV / 32], win[DV / 32];  // what it mixes, all asked for at once: it comes from memory
    float g[3];
    if constexpr (MIX) {
#pragma unroll
      for (int m = 0; m < DV / 32; m++) {
        cmp[m] = load_once(reinterpret_cast<const uint4*>(c.o_cmp) + word + 4 * m);
        win[m] = load_once(reinterpret_cast<const uint4*>(c.o_win) + word + 4 * m);
      }
#pragma unroll
      for (int i = 0; i < 3; i++) g[i] = gate(c, at * 3 + i);
    }
    float l = x.l[h];
    l += __shfl_xor_sync(~0u, l, 1);
    l += __shfl_xor_sync(~0u, l, 2);
    const float inverse = l > 0 ? 1.0f / l : 0.0f;
    if (stored && j == 0)
      c.lse[((i64)batch * c.heads + head) * c.rows + row] = l > 0 ? (x.m[h] + log2_fast(l)) * LN2 : minus_infinity();
#pragma unroll
    for (int m = 0; m < DV / 32; m++) {  // 32 columns; after the exchange a lane has 8 neighbouring ones
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = pack(x.acc[4 * m + i][2 * h] * inverse, x.acc[4 * m + i][2 * h + 1] * inverse);
      transpose(w, j);
      if (stored && c.o) store_once(reinterpret_cast<uint4*>(c.o) + word + 4 * m, make_uint4(w[0], w[1], w[2], w[3]));
      if constexpr (MIX) {
        const uint4 a = cmp[m], b = win[m];
        const uint4 s = make_uint4(mix(a.x, w[0], b.x, g), mix(a.y, w[1], b.y, g), mix(a.z, w[2], b.z, g), mix(a.w, w[3], b.w, g));
        if (stored) store_once(reinterpret_cast<uint4*>(c.mixed) + word + 4 * m, s);
      }
    }
  }
}
__device__ __forceinline__ void finish(const Rows& x, const Call& c, int batch, int first, int queries, int hk, int lane) {
  if (c.mixed) write<true>(x, c, batch, first, queries, hk, lane);
  else write<false>(x, c, batch, first, queries, hk, lane);
}

// The loads of a tile ahead of its blocks: of each warp's queries their heads in boxes of 64 columns. Past a sequence's end come
// others' rows, and past the tensor's zeros: nobody uses them.
__device__ __forceinline__ void load_queries(Loads<SLOTS>& loads, const TensorMap* q_map, u32 head) {
  const int batch = word(head, BATCH), first = word(head, ROW), of = word(head, KV_HEAD) * G;
  for (int row = first; row < first + R; row += SHARE * Q)
    loads.next(WARPS - SHARE, SHARE * ROWS_BYTES, [&](u32 to, u32 full) {
      for (int n = 0; n < SHARE; n++, to += ROWS_BYTES) {
#pragma unroll
        for (int column = 0; column < D; column += COLUMNS)
          load_box_once(to + column / COLUMNS * ROWS_BOX_BYTES, q_map, full, column, of, row + n * Q, batch);
      }
    });
}

__device__ __forceinline__ void take_queries(Left& left, Ring<SLOTS>& ring, u32 load, int warp, u32 turned, int lane) {
  const u32 slot = ring.wait(load);
  u32 at = ring.tile(slot) + warp % SHARE * ROWS_BYTES, after = 0;
  asm volatile("" : "+r"(at));  // made here, not kept
  at += turned;
#pragma unroll
  for (int d = 0; d < D / 16; d++) {
    left.take(d, at);
    after |= left.bits(d);
  }
  ring.leave(slot, after, lane);
}

__device__ __forceinline__ void multiply(Ring<SLOTS>& ring, const Call& c, int warp, int lane) {
  const int items = c.tiles * c.kv_heads;
  const u32 straight = straight_at(lane), turned = turned_at(lane);
  Left left;
  left.stash = ring.slots + STASH + warp * (STASHED * FRAGMENT_BYTES) + lane * 16;
  Rows x;
  u32 first = 0;  // loads of the tiles before
  int i = blockIdx.x;
  u32 head = head_words<R>(c, i, items, lane), next = head_words<R>(c, i + gridDim.x, items, lane);
  Walk<R> walk;
  walk.begin(c, i, warp, lane);
  while (i < items) {
    reset(x);
    __syncwarp();
    take_queries(left, ring, first + warp / SHARE, warp, turned, lane);
    const int position = word(head, POSITION) + warp * Q, k_len = word(head, END);
#pragma unroll 1
    for (int e = 0; e < walk.MOST; e++) {
      const auto entry = walk.step(e);
      if (entry.ends()) break;
      const int key = entry.block() * SIZE;
      attend(ring, first + AHEAD + 2 * entry.place(), entry.queries(), position - key, k_len - key, x, left, straight, turned,
             c.scale, lane);
    }
    __syncwarp();
    const int batch = word(head, BATCH), row = word(head, ROW) + warp * Q, hk = word(head, KV_HEAD);
    const int queries = word(head, QUERIES);
    const bool stored = warp * Q < queries;
    first += AHEAD + 2 * word(head, COUNT);
    // What the next tile needs comes while this one's rows are written.
    i += gridDim.x;
    head = next;
    next = head_words<R>(c, i + gridDim.x, items, lane);
    if (i < items) walk.begin(c, i, warp, lane);
    if (stored) finish(x, c, batch, row, queries - warp * Q, hk, lane);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
selected_forward(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
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
