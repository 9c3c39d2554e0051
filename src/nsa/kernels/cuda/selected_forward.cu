// Selected attention on Hopper, a warp for two queries: what a query did not select is not computed for it.
//
// A tile is R neighbouring queries of a KV head, all G heads of each. The blocks that any of them selected come once, through a ring
// in shared memory; each warp walks its own list of them and never touches the others. Reading keys and values from shared memory is
// what bounds this (16 rows a fragment), so a warp has two queries: where both want a block they share its fragments.
//
// One CTA a multiprocessor goes from tile to tile, and its warps run over a tile's end on their own: nothing waits for all of them.
#include "instructions.cuh"

namespace {

constexpr int D = 128, G = 16, SIZE = 64;        // head dim, heads of a group, keys of a selection block
constexpr int R = 16, WIDTH = 16;                // queries of a tile, blocks that one has at most
constexpr int WARPS = 8, PAIR = 2;               // warps that multiply, queries of each
constexpr int THREADS = (WARPS + 4) * 32;        // and a warpgroup of which one warp loads
constexpr int SLOTS = 10;                        // of the ring, each the keys or the values of a block
constexpr int TILE_BYTES = SIZE * D * 2, QUERY_BYTES = G * D * 2;
constexpr int BARRIERS = SLOTS * TILE_BYTES + R * QUERY_BYTES;  // where they lie, after the ring and the queries
constexpr float LN2 = 0.6931471805599453f;
constexpr float LAZY = 8;                        // the maximum in use may be 2^8 too low: no probability is over 256

static_assert(R == WARPS * PAIR && R * WIDTH == 256 && G == 16, "a fragment has 16 rows");

// The lists of a tile, `ITEM` words, in the order in which the tiles are computed:
// R * WIDTH words of the union, each a block | warps that want it << 24;
// for each warp PAIR * WIDTH words, each a block | its place in the union << 20 | which queries want it << 29, by place, then 0;
// and the head, where the tile lies.
constexpr int UNION = 0, OWN = R * WIDTH, HEAD = 2 * R * WIDTH, ITEM = HEAD + 8;
enum Head { COUNT, BATCH, ROW, QUERIES, K_ROW, END, POSITION, KV_HEAD };

}  // namespace

// The arguments. `Span`'s half of a launch is in kernels/triton/sequence.py.
struct Call {
  const int* tile_seq;    // [tiles], null unless packed
  const int* tile_first;  // [num_seqs + 1], null unless packed
  const int* table;       // [num_seqs + 1, 6], or null: q_len, k_len and offset hold for all
  int per_seq, q_len, k_len, offset;
  int rows, tiles, heads, kv_heads;  // rows of q
  int covers_keys;        // no row of the keys is outside of all sequences
  int width, words;       // blocks a query, and words of a bit for each block
  const int* indices;     // [B, rows, HK, width]
  u32* lists;             // [HK * tiles, ITEM]
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

// ---- lists

// A CTA of R * WIDTH threads for each tile and KV head, a thread for each slot.
extern "C" __global__ void __launch_bounds__(R * WIDTH) selected_lists(const Call c) {
  extern __shared__ u32 bits[];  // [words], the union
  u32* before = bits + c.words;  // [words], blocks in the words ahead
  __shared__ u32 wanted[R * WIDTH];
  __shared__ int total;
  const int tid = threadIdx.x, lane = tid & 31, slot = tid & 15, half = lane & 16, tile = blockIdx.x, hk = blockIdx.y;
  int seq, start;
  if (c.tile_seq) {
    seq = c.tile_seq[tile];
    start = (tile - c.tile_first[seq]) * R;
  } else {
    seq = tile / c.per_seq;
    start = tile % c.per_seq * R;
  }
  int batch = seq, q_row = 0, q_len = c.q_len, k_row = 0, k_len = c.k_len, offset = c.offset;
  if (c.table) {
    const int* row = c.table + (i64)seq * 6;
    batch = row[0], q_row = row[1], q_len = row[2], k_row = row[3], k_len = row[4], offset = row[5];
  }
  const int queries = max(0, min(R, q_len - start)), query = tid / WIDTH, position = offset + start + query;
  for (int i = tid; i < c.words; i += R * WIDTH) bits[i] = 0;
  wanted[tid] = 0;
  int block = -1;
  if (query < queries && slot < c.width)
    block = c.indices[(((i64)batch * c.rows + q_row + start + query) * c.kv_heads + hk) * c.width + slot];
  bool mine = block >= 0 && position >= 0 && block <= position / SIZE && block < (k_len + SIZE - 1) / SIZE;
#pragma unroll
  for (int d = 1; d < WIDTH; d++) {  // named twice counts once
    const int other = __shfl_sync(~0u, block, half | ((slot - d) & 15));
    if (slot >= d && other == block) mine = false;
  }
  __syncthreads();
  if (mine) atomicOr(&bits[block >> 5], 1u << (block & 31));
  __syncthreads();
  if (tid < 32) {
    int sum = 0;
    for (int i = 0; i < c.words; i += 32) {
      const int own = i + lane < c.words ? __popc(bits[i + lane]) : 0;
      int upto = own;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += other;
      }
      if (i + lane < c.words) before[i + lane] = sum + upto - own;
      sum += __shfl_sync(~0u, upto, 31);
    }
    if (lane == 0) total = sum;
  }
  __syncthreads();
  const u32 place = mine ? before[block >> 5] + __popc(bits[block >> 5] & ((1u << (block & 31)) - 1)) : 0xffffu;
  // The lower half of the lanes is the warp's first query. What both want stands in its list, for both.
  bool both = false;
#pragma unroll
  for (int d = 0; d < WIDTH; d++) both |= __shfl_sync(~0u, place, (half ^ 16) | d) == place;
  const u32 which = !mine ? 0 : half ? (both ? 0 : 2) : (both ? 3 : 1);
  const bool keep = which != 0;
  if (keep) atomicAdd(&wanted[place], 1u);
  __syncthreads();
  u32* item = c.lists + ((i64)hk * c.tiles + c.tiles - 1 - tile) * ITEM;  // the last see most: they go first
  if (keep) item[UNION + place] = block | wanted[place] << 24;
  const u32 key = keep ? place : 0x10000u + lane;
  int rank = 0;
#pragma unroll
  for (int d = 0; d < 32; d++) rank += __shfl_sync(~0u, key, d) < key;
  item[OWN + tid - lane + rank] = keep ? (block | place << 20 | which << 29) : 0;
  if (tid == 0) {
    item[HEAD + COUNT] = total;
    item[HEAD + BATCH] = batch;
    item[HEAD + ROW] = q_row + start;
    item[HEAD + QUERIES] = queries;
    item[HEAD + K_ROW] = k_row;
    item[HEAD + END] = c.covers_keys ? 0x7fffffff : k_len;  // past it lies what must not be read
    item[HEAD + POSITION] = offset + start;
    item[HEAD + KV_HEAD] = hk;
  }
}

// ---- attention

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

__device__ __forceinline__ void hide_future(float (&s)[8][4], int last, int lane) {  // keys of the block behind its key `last`
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (i * 8 + (lane & 3) * 2 + (j & 1) > last) s[i][j] = minus_infinity();
}

template <int N>
__device__ __forceinline__ void add_values(const u32 (&p)[N][4][4], Rows& x, Rows& y, u32 v_at) {
#pragma unroll
  for (int keys = 0; keys < SIZE / 16; keys++)
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      u32 b[4];
      load_turned(b, (v_at ^ (d & 3) * 32) + (d >> 2) * (TILE_BYTES / 2) + keys * 2048);
#pragma unroll
      for (int n = 0; n < N; n++) {
        Rows& to = n == 0 ? x : y;
        multiply_add(to.acc[2 * d], p[n][keys], b[0], b[1]);
        multiply_add(to.acc[2 * d + 1], p[n][keys], b[2], b[3]);
      }
    }
}

// Zero the rows of a tile of values from row `end` on: 0 times the NaN that may follow a sequence is not 0. All warps that want the
// block do so, each before it reads; they write the same.
__device__ __forceinline__ void blank_past(u32 tile, int end, int lane) {
  for (int i = end * 8 + lane; i < SIZE * 8; i += 32) {
    store_zeros(tile + i * 16);
    store_zeros(tile + TILE_BYTES / 2 + i * 16);
  }
  writes_before_loads();  // the slot's next load comes behind these writes
  __syncwarp();
}

struct Ring {
  u32 slots, full, empty, issued;  // shared addresses
  u32 zero;                        // 0, unknown to the compiler
  u32 seen;                        // what was last read of `issued`, the number of loads that the loading warp has begun

  // Wait for load `j`. A warp leaves out loads, so its slot's barrier may be a phase behind, which a parity can't tell from one
  // ahead. But once `j` has begun, all earlier loads into the slot have come and been left.
  __device__ __forceinline__ u32 wait(u32 j) {
    while (seen <= j) {
      seen = __shfl_sync(~0u, load_volatile(issued), 0);
      if (seen > j) break;
      barrier_try(full + seen % SLOTS * 8, seen / SLOTS & 1);  // sleeps till about the next load's arrival; no matter the answer
    }
    const u32 slot = j % SLOTS;
    barrier_wait(full + slot * 8, j / SLOTS & 1);
    return slot;
  }
  // `after`: bits of all that was made of the slot's tile. Without them the compiler arrives while the last reads are on their way.
  __device__ __forceinline__ void leave(u32 slot, u32 after, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + slot * 8 + (after & zero), 1);
  }
};

// A block into N queries' rows: of its keys the first query sees those to `last`, the second one more. Before key `end` they are of
// the sequence.
template <int N>
__device__ __forceinline__ void attend(Ring& ring, u32 load, int last, int end, Rows& x, Rows& y, const u32 (&q_at)[PAIR],
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
    for (int n = 0; n < N; n++) hide_future(s[n], last + n, lane);
  }
  u32 p[N][4][4];
  soften(s[0], p[0], x, scale);
  if constexpr (N == 2) soften(s[1], p[1], y, scale);
  slot = ring.wait(load + 1);
  if (end < SIZE) blank_past(ring.slots + slot * TILE_BYTES, end, lane);
  add_values<N>(p, x, y, ring.slots + slot * TILE_BYTES + turned);
  after = 0;
#pragma unroll
  for (int i = 0; i < D / 8; i++) after |= __float_as_uint((N == 2 ? y : x).acc[i][0]);
  ring.leave(slot, after, lane);
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

// Words of a tile's head, one a lane.
__device__ __forceinline__ u32 head_of(const Call& c, int i, int items, int lane) {
  return i < items ? c.lists[(i64)i * ITEM + HEAD + (lane & 7)] : 0;
}
__device__ __forceinline__ int word(u32 head, Head which) { return (int)__shfl_sync(~0u, head, which); }

// The loading warp. It arrives at a slot's `empty` for the warps that don't want the load.
__device__ __forceinline__ void load_blocks(const Ring& ring, const TensorMap* k_map, const TensorMap* v_map, const Call& c, int lane) {
  const int items = c.tiles * c.kv_heads;
  u32 slot = 0, parity = 1, begun = 0;
  int i = blockIdx.x, from = 0;  // 32 words of the union at a time, those of the next loop loaded in this one
  u32 head = head_of(c, i, items, lane), part = c.lists[(i64)i * ITEM + UNION + lane];
  while (i < items) {
    const int count = word(head, COUNT), batch = word(head, BATCH), k_row = word(head, K_ROW), hk = word(head, KV_HEAD);
    const int some = min(32, count - from);
    const u32 now = part;
    from += 32;
    if (from >= count) {
      from = 0;
      i += gridDim.x;
      head = head_of(c, i, items, lane);
    }
    if (i < items) part = c.lists[(i64)i * ITEM + UNION + from + lane];
    for (int e = 0; e < some; e++) {
      const u32 entry = __shfl_sync(~0u, now, e);
      const int row = k_row + (int)(entry & 0xffffff) * SIZE, others = WARPS - (int)(entry >> 24);
#pragma unroll
      for (int values = 0; values < 2; values++) {
        barrier_wait(ring.empty + slot * 8, parity);
        if (lane == 0) {
          const u32 full = ring.full + slot * 8, to = ring.slots + slot * TILE_BYTES;
          if (others > 0) barrier_arrive(ring.empty + slot * 8, others);
          barrier_expect(full, TILE_BYTES);
          load_box(to, values ? v_map : k_map, full, 0, hk, row, batch);
          load_box(to + TILE_BYTES / 2, values ? v_map : k_map, full, D / 2, hk, row, batch);
          store_volatile(ring.issued, ++begun);
        }
        __syncwarp();
        if (++slot == SLOTS) slot = 0, parity ^= 1;
      }
    }
  }
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

__device__ __forceinline__ void multiply(Ring& ring, u32 queries, const Call& c, int warp, int lane) {
  const int items = c.tiles * c.kv_heads;
  // Lanes 8 i to 8 i + 7 give the rows of matrix i of a 16 x 16 piece. Keys: rows 0 to 7 (columns 0 to 7, 8 to 15), then rows 8 to
  // 15. Queries, and values, which are turned: columns 0 to 7 (rows 0 to 7, 8 to 15), then columns 8 to 15.
  const u32 straight = ((lane >> 4) * 8 + (lane & 7)) * 128 + ((lane >> 3 & 1) ^ (lane & 7)) * 16;
  const u32 turned = ((lane >> 3 & 1) * 8 + (lane & 7)) * 128 + ((lane >> 4) ^ (lane & 7)) * 16;
  queries += warp * (PAIR * QUERY_BYTES);
  const u32 q_at[PAIR] = {queries + turned, queries + QUERY_BYTES + turned};
  const u32 second_at[PAIR] = {q_at[1], q_at[1]};
  Rows x, y;
  u32 first = 0;  // blocks of the tiles before
  int i = blockIdx.x;
  u32 head = head_of(c, i, items, lane), next = head_of(c, i + gridDim.x, items, lane);
  u32 list = c.lists[(i64)i * ITEM + OWN + warp * 32 + lane];
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
    next = head_of(c, i + gridDim.x, items, lane);
    if (i < items) {
      list = c.lists[(i64)i * ITEM + OWN + warp * 32 + lane];
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
  Ring ring;
  ring.slots = (shared_address(memory) + 1023) & ~1023u;  // what the swizzle counts from
  ring.full = ring.slots + BARRIERS;
  ring.empty = ring.full + SLOTS * 8;
  ring.issued = ring.empty + SLOTS * 8;
  ring.zero = c.zero;
  ring.seen = 0;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(ring.full + i * 8, 1);
      barrier_init(ring.empty + i * 8, WARPS);
    }
    store_volatile(ring.issued, 0);
    barriers_visible();
  }
  __syncthreads();
  // Registers move only within what the CTA was given: 12 warps of 168.
  if (warp >= WARPS) {
    fewer_registers<24>();
    if (warp == WARPS) load_blocks(ring, &k_map, &v_map, c, lane);
  } else {
    more_registers<240>();
    multiply(ring, ring.slots + SLOTS * TILE_BYTES, c, warp, lane);
  }
}
