// A decode step of one token on Hopper: a CTA does all that a sequence's KV head has to do, from the compressed keys to the output.
//
// Keys and values come once, through a ring in shared memory, and each tile of 64 is one warp's: nothing waits for all warps but
// where a branch ends. Behind the compressed tiles come those of the window. They fill the ring while blocks are chosen, so that
// memory does not idle, and are computed by the warps that don't choose. Then come the selected blocks.
#include "ring.cuh"
#include "softmax.cuh"

namespace {

constexpr int WARPS = 8, MULTIPLY = WARPS * 32;        // that multiply, and their threads
constexpr int THREADS = (WARPS + 4) * 32;              // and a warpgroup of which one warp loads
constexpr int SLOTS = (128 << 10) / (K_BYTES + V_BYTES) * 2;  // of the ring, each the keys or the values of a tile
constexpr int LENGTH = 32, STRIDE = 16, LEAD = LENGTH / STRIDE - 1;  // a compressed block lies where its last stride does
constexpr int STARTING = SIZE / STRIDE, PER_TILE = SIZE / STARTING;  // compressed blocks that start in a selection block
constexpr int MOST_BLOCKS = 4096, MOST_CHOSEN = 32;    // selection blocks of a sequence, and of its newest token
constexpr int PART = 32, APART = PART + 8;             // columns that the warps add up at a time, and how far rows lie apart
constexpr int FORCED = 0x7f800000;                     // infinity: no importance is higher
constexpr int NEAR_TILES = 66, KEPT = ROWS * (PER_TILE + 2);  // tiles whose weights shared memory holds, and numbers of a tile

// In shared memory, after the ring's tiles.
constexpr int BARRIERS = Ring<SLOTS>::BYTES;
constexpr int CHOSEN = BARRIERS + (2 * SLOTS + 2) * 8;      // a barrier: the list is there
constexpr int LIST = CHOSEN + 8;                            // int [MOST_CHOSEN], ascending, -1 behind the last
constexpr int STATS = (LIST + MOST_CHOSEN * 4 + 15) & ~15;  // float2 [WARPS][ROWS], a warp's maximum and sum
constexpr int LSE = STATS + WARPS * ROWS * 8;               // float [ROWS], of the compressed branch, in units of log2
constexpr int FEW = LSE + ROWS * 4;                         // int2 [32]: ranks and blocks of those that may be chosen
constexpr int SPACE = FEW + 32 * 8;                         // float [WARPS][ROWS][APART], or int [MOST_BLOCKS + 1] of ranks
constexpr int SPACE_BYTES = WARPS * ROWS * APART * 4;
constexpr int NEAR = SPACE + SPACE_BYTES;                   // float [NEAR_TILES][KEPT]: as `kept` below
static_assert(SPACE_BYTES >= (MOST_BLOCKS + 1) * 4 && SPACE % 16 == 0 && NEAR % 16 == 0);
static_assert(1023 + NEAR + NEAR_TILES * KEPT * 4 <= 227 << 10);

}  // namespace

// The arguments. A pair is a sequence and a KV head.
struct Call {
  const u16* q;             // [B, HQ, D]
  const void* gates;        // [B, HQ, 3]
  const int* lengths;       // [B]
  float* kept;              // [pairs, tiles, KEPT], or null where shared memory has room for it
  u16* o;                   // [B, HQ, DV]
  int* indices;             // [B, HK, n]
  int heads, kv_heads, group;
  int tiles, rows;          // of compressed blocks, and tokens, that a sequence has room for
  int slots, window;        // of the window's ring
  int n, num_initial, num_local;
  int wide_gates;           // fp32, else of q's type
  float scale;              // with log2(e)
  u32 zero;                 // 0, which the compiler must not know
};

namespace {

// What a pair has to read.
struct Work {
  int batch, hk, tokens, own;  // own: the newest token's selection block, or -1
  int blocks, tiles;           // compressed
  int newest, slots, held;     // of the window's ring: the newest token's slot, all slots, and tokens of the window

  __device__ __forceinline__ explicit Work(const Call& c) {
    batch = blockIdx.x / c.kv_heads;
    hk = blockIdx.x % c.kv_heads;
    tokens = max(0, min(c.lengths[batch], c.rows));
    own = tokens > 0 ? (tokens - 1) / SIZE : -1;
    blocks = tokens < LENGTH ? 0 : (tokens - LENGTH) / STRIDE + 1;
    tiles = min((blocks + SIZE - 1) / SIZE, c.tiles);
    slots = c.slots;
    newest = max(tokens - 1, 0) % slots;
    held = min(c.window, tokens);
  }
  __device__ __forceinline__ int age(int slot) const { return newest - slot + (slot > newest ? slots : 0); }
  // Whether any of the ring's slots from `first` on, to the tile's end, holds a token of the window.
  __device__ __forceinline__ bool wants(int first) const {
    const int last = min(first + SIZE, slots) - 1;
    return (newest >= first && newest <= last ? 0 : age(last)) < held;
  }
};

__device__ __forceinline__ void multiplying_warps() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLY) : "memory"); }

template <class T>
__device__ __forceinline__ T& at(u32 slots, int offset, int i) {
  extern __shared__ unsigned char memory[];
  return reinterpret_cast<T*>(memory + (slots - shared_address(memory)) + offset)[i];
}

// ---- loading

struct Maps {
  const TensorMap *k, *v;
};

__device__ __forceinline__ void load_tile(Loads<SLOTS>& loads, const Maps& maps, const Work& w, int row) {
#pragma unroll
  for (int values = 0; values < 2; values++) {
    const TensorMap* map = values ? maps.v : maps.k;
    const int columns = values ? DV : D;
    loads.next(WARPS - 1, values ? V_BYTES : K_BYTES, [&](u32 to, u32 full) {
#pragma unroll
      for (int column = 0; column < columns; column += COLUMNS)
        load_box_once(to + column / COLUMNS * BOX_BYTES, map, full, column, w.hk, row, w.batch);
    });
  }
}

__device__ __forceinline__ void load_all(const Ring<SLOTS>& ring, const Maps& cmp, const Maps& slc, const Maps& win, const Call& c,
                                         int lane) {
  const Work w(c);
  Loads<SLOTS> loads(ring, lane);
  for (int t = 0; t < w.tiles; t++) load_tile(loads, cmp, w, t * SIZE + LEAD);
  for (int first = 0; first < w.slots; first += SIZE)
    if (w.wants(first)) load_tile(loads, win, w, first);
  barrier_wait(ring.slots + CHOSEN, 0);
  for (int i = 0; i < c.n; i++) {
    const int block = at<int>(ring.slots, LIST, i);
    if (block < 0) break;
    load_tile(loads, slc, w, block * SIZE);
  }
}

// ---- a tile

using Left = Operand<D, 0>;

__device__ __forceinline__ int column_of(int lane, int i, int j) { return i * 8 + (lane & 3) * 2 + (j & 1); }

// Of a tile whose load of keys is `load`, the keys that `seen` says into the warp's rows; `whole`: all of them. `s` become their
// probabilities, by the maximum in use.
template <class Seen>
__device__ __forceinline__ void attend(float (&s)[8][4], Ring<SLOTS>& ring, u32 load, bool whole, Seen seen, Rows& x, const Left& left,
                                       float scale, int lane) {
  u32 slot = ring.wait(load);
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) s[i][j] = 0;
  product(s, left, ring.tile(slot) + straight_at(lane));
  u32 after = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) after |= __float_as_uint(s[i][0]);
  ring.leave(slot, after, lane);
  if (!whole) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (!seen(column_of(lane, i, j))) s[i][j] = minus_infinity();
  }
  u32 p[1][4][4];
  soften(s, p[0], x, scale, 1, lane);
  slot = ring.wait(load + 1);
  if (!whole) {  // 0 times what memory holds there is not 0
    for (int row = lane >> 3; row < SIZE; row += 4)
      if (!seen(row)) {
#pragma unroll
        for (int box = 0; box < V_BYTES; box += BOX_BYTES) store_zeros(ring.tile(slot) + box + row * 128 + (lane & 7) * 16);
      }
    writes_before_loads();  // the slot's next load comes behind these writes
    __syncwarp();
  }
  add_product<1>(p, x.acc, x.acc, ring.tile(slot) + turned_at(lane));
  after = 0;
#pragma unroll
  for (int i = 0; i < DV / 8; i++) after |= __float_as_uint(x.acc[i][0]);
  ring.leave(slot, after, lane);
}

// Where a tile's selection block lies among its weights: so each lane has four neighbouring ones.
__device__ __forceinline__ int block_at(int place) { return (place & 7) * 2 + (place >> 3); }

// What is kept of a tile, in KEPT numbers: of each row and selection block a weight, [ROWS][PER_TILE] in the order of `block_at`;
// the maximum that a row's weights refer to, [ROWS], in units of log2; and what it hands to the first block of the next, [ROWS].
constexpr int PEAKS = ROWS * PER_TILE, EDGES = PEAKS + ROWS;

// A tile's probabilities, added up by selection block: equation 9, in which a compressed block counts once for each of its strides
// that lie in the selection block, the last one's second stride for the next.
__device__ __forceinline__ void keep(const float (&s)[8][4], const Rows& x, float* kept, int lane) {
  const int part = lane & 3, row = lane >> 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float before = 0, sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {  // parts 0 and 1 have the keys of selection block 2 i, 2 and 3 those of 2 i + 1
      const float a = s[i][2 * h], b = s[i][2 * h + 1];
      const float handed = __shfl_sync(~0u, part == 3 ? before : b, part == 0 ? lane + 3 : lane - 1);
      float sum = part & 1 ? 2 * a + b : 2 * (a + b) + handed;
      sum += __shfl_xor_sync(~0u, sum, 1);
      if ((part & 1) == i / 4) sums[i % 4] = sum;
      before = b;
    }
    const int r = row + 8 * h;
    reinterpret_cast<float4*>(kept)[r * (PER_TILE / 4) + part] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    if (part == 3) kept[EDGES + r] = before;
    if (part == 0) kept[PEAKS + r] = x.m[h];
  }
}

// ---- the end of a branch

__device__ __forceinline__ float gate(const Call& c, i64 i) {
  return c.wide_gates ? static_cast<const float*>(c.gates)[i] : widen(static_cast<const u16*>(c.gates)[i]);
}

// All warps' rows, times the branch's gates over the softmax's sum, into `out`: of row thread / 16, of each PART of the columns two.
// The rows' lse stays in shared memory.
__device__ __forceinline__ void end_branch(const float (&gates)[2], Rows& x, float (&out)[DV / PART][2], u32 slots, int warp,
                                           int lane) {
  const int row = lane >> 2, part = lane & 3, thread = warp * 32 + lane;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    x.l[h] += __shfl_xor_sync(~0u, x.l[h], 1);
    x.l[h] += __shfl_xor_sync(~0u, x.l[h], 2);
    if (part == 0) at<float2>(slots, STATS, warp * ROWS + row + 8 * h) = make_float2(x.m[h], x.l[h]);
  }
  multiplying_warps();
  float share[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row + 8 * h;
    float most = minus_infinity(), sum = 0;
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, at<float2>(slots, STATS, i * ROWS + r).x);
    for (int i = 0; i < WARPS; i++) {
      const float2 its = at<float2>(slots, STATS, i * ROWS + r);
      if (its.y > 0) sum += its.y * exp2_fast(its.x - most);
    }
    share[h] = x.l[h] > 0 ? gates[h] * exp2_fast(x.m[h] - most) / sum : 0;
    if (warp == 0 && part == 0) at<float>(slots, LSE, r) = most + log2_fast(sum);
  }
#pragma unroll
  for (int chunk = 0; chunk < DV / PART; chunk++) {
#pragma unroll
    for (int i = 0; i < PART / 8; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float* sums = x.acc[chunk * (PART / 8) + i] + 2 * h;
        at<float2>(slots, SPACE, ((warp * ROWS + row + 8 * h) * APART + i * 8) / 2 + part) =
            make_float2(sums[0] * share[h], sums[1] * share[h]);
      }
    multiplying_warps();
    for (int i = 0; i < WARPS; i++) {
      const float2 its = at<float2>(slots, SPACE, (i * ROWS + thread / 16) * APART / 2 + thread % 16);
      out[chunk][0] += its.x;
      out[chunk][1] += its.y;
    }
    multiplying_warps();
  }
}

// ---- the choice

__device__ __forceinline__ void load_rows(float (&x)[ROWS], const float* from) {
#pragma unroll
  for (int i = 0; i < ROWS / 4; i++) {
    const float4 y = reinterpret_cast<const float4*>(from)[i];
    x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
  }
}

// How each of the pair's selection blocks ranks, as integers: the bits of its importance, or FORCED. Of `kept`, maxima become what
// makes probabilities of the weights.
__device__ __forceinline__ void rank_blocks(float* kept, const Call& c, const Work& w, u32 slots, int thread) {
  for (int i = thread; i < w.tiles * ROWS; i += MULTIPLY) {
    float* peak = kept + i / ROWS * KEPT + PEAKS + i % ROWS;
    *peak = i % ROWS < c.group ? exp2_fast(*peak - at<float>(slots, LSE, i % ROWS)) : 0;
  }
  multiplying_warps();
  for (int i = thread; i < w.tiles * PER_TILE; i += MULTIPLY) {
    const int tile = i / PER_TILE, place = i % PER_TILE, block = tile * PER_TILE + block_at(place);
    if (block > w.own) continue;
    const float* its = kept + tile * KEPT;
    float weights[ROWS], factors[ROWS], rest = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) weights[r] = its[r * PER_TILE + place];
    load_rows(factors, its + PEAKS);
    if (place == 0 && tile > 0) {
      float edges[ROWS], edge_factors[ROWS];
      load_rows(edges, its + EDGES - KEPT);
      load_rows(edge_factors, its + PEAKS - KEPT);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        // Blocks that tie must agree in their last bit, so what comes in two parts is added up first where it can be.
        if (edge_factors[r] == factors[r]) weights[r] += edges[r];
        else rest += edges[r] * edge_factors[r];
      }
    }
    float sum = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum += weights[r] * factors[r];
    const bool forced = block < c.num_initial || block > w.own - c.num_local;
    at<int>(slots, SPACE, block) = forced ? FORCED : __float_as_int(sum + rest);
  }
  // The newest token's own block, in which no compressed one need start.
  if (thread == 0 && w.own >= w.tiles * PER_TILE) at<int>(slots, SPACE, w.own) = FORCED;
}

// How many of the first `count` ranks are `least` or higher.
__device__ __forceinline__ int reached(u32 slots, int count, int least, int lane) {
  int some = 0;
#pragma unroll 8
  for (int i = lane; i < count; i += 32) some += at<int>(slots, SPACE, i) >= least;
  return __reduce_add_sync(~0u, some);
}

// How many lanes have a higher rank than this one, or as high a one and come before it.
__device__ __forceinline__ int ahead_of(int rank, int lane) {
  int ahead = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int other = __shfl_sync(~0u, rank, i);
    ahead += other > rank || (other == rank && i < lane);
  }
  return ahead;
}

// The `n` highest of `count` ranks, which `low` is not above, to the list; how many they are.
__device__ __forceinline__ int choose_of_many(u32 slots, int count, int low, int high, int n, int lane) {
  int c_low = reached(slots, count, low, lane), c_high = 0;
  while (c_low != n && high - low > 1) {  // n or more reach `low`, fewer `high`
    const int middle = low + (high - low) / 2, some = reached(slots, count, middle, lane);
    if (some >= n) low = middle, c_low = some;
    else high = middle, c_high = some;
  }
  // All above `low` are chosen, and of those at it the first, as many as there are places left.
  int ties = c_low == n ? n : n - c_high, written = 0;
  const u32 below = (1u << lane) - 1;
  for (int first = 0; first < count; first += 32) {
    const int rank = first + lane < count ? at<int>(slots, SPACE, first + lane) : -1;
    const u32 level = __ballot_sync(~0u, rank == low);
    const bool taken = rank > low || (rank == low && __popc(level & below) < ties);
    const u32 all = __ballot_sync(~0u, taken);
    if (taken) at<int>(slots, LIST, written + __popc(all & below)) = first + lane;
    written += __popc(all);
    ties -= __popc(level);
  }
  return written;
}

// By a warp: the `n` highest of `count` ranks to the list, ascending, of those that tie the first.
__device__ __forceinline__ void choose(u32 slots, int count, int n, int lane) {
  int top = -1;
#pragma unroll 8
  for (int i = lane; i < count; i += 32) top = max(top, at<int>(slots, SPACE, i));
  // The n-th highest of the lanes' own highest: n ranks or more reach it, mostly few more.
  const int low = max(0, __shfl_sync(~0u, top, __ffs(__ballot_sync(~0u, ahead_of(top, lane) == n - 1)) - 1));
  const u32 below = (1u << lane) - 1;
  constexpr int AT_ONCE = 8;
  int some = 0;
  for (int first = 0; first < count; first += 32 * AT_ONCE) {
    int ranks[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int block = first + 32 * i + lane;
      ranks[i] = block < count ? at<int>(slots, SPACE, block) : -1;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const u32 all = __ballot_sync(~0u, ranks[i] >= low);
      const int place = some + __popc(all & below);
      if (ranks[i] >= low && place < 32) at<int2>(slots, FEW, place) = make_int2(ranks[i], first + 32 * i + lane);
      some += __popc(all);
    }
  }
  __syncwarp();
  int written;
  if (some <= 32) {
    const int2 its = lane < some ? at<int2>(slots, FEW, lane) : make_int2(-1, -1);
    const bool taken = ahead_of(its.x, lane) < n && lane < some;
    const u32 all = __ballot_sync(~0u, taken);
    if (taken) at<int>(slots, LIST, __popc(all & below)) = its.y;
    written = __popc(all);
  } else {
    written = choose_of_many(slots, count, low, __reduce_max_sync(~0u, top) + 1, n, lane);
  }
  if (lane >= written) at<int>(slots, LIST, lane) = -1;
}

// ---- all of it

__device__ __forceinline__ void take_queries(Left& left, const Call& c, const Work& w, int lane) {
  const u16* q = c.q + ((i64)w.batch * c.heads + w.hk * c.group) * D + (lane & 3) * 2;
#pragma unroll
  for (int d = 0; d < D / 16; d++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = (lane >> 2) + (i & 1) * 8, column = d * 16 + (i >> 1) * 8;
      left.kept[d][i] = row < c.group ? *reinterpret_cast<const u32*>(q + row * D + column) : 0;
    }
}

__device__ __forceinline__ void multiply(Ring<SLOTS>& ring, const Call& c, int warp, int lane) {
  const Work w(c);
  const u32 slots = ring.slots;
  Left left;
  take_queries(left, c, w, lane);
  float gates[3][2];
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < 3; i++) {
      const int row = (lane >> 2) + 8 * h;
      gates[i][h] = row < c.group ? gate(c, ((i64)w.batch * c.heads + w.hk * c.group + row) * 3 + i) : 0;
    }
  float* kept = c.kept ? c.kept + (i64)blockIdx.x * c.tiles * KEPT : &at<float>(slots, NEAR, 0);
  float out[DV / PART][2] = {}, s[8][4];
  Rows x;

  reset(x);
#pragma unroll 1
  for (int t = warp; t < w.tiles; t += WARPS) {
    const int end = w.blocks - t * SIZE;
    attend(s, ring, 2 * t, end >= SIZE, [&](int i) { return i < end; }, x, left, c.scale, lane);
    keep(s, x, kept + t * KEPT, lane);
  }
  end_branch(gates[0], x, out, slots, warp, lane);
  rank_blocks(kept, c, w, slots, warp * 32 + lane);
  multiplying_warps();

  reset(x);
  u32 load = 2 * w.tiles;
  if (warp == 0) {
    choose(slots, w.own + 1, c.n, lane);
    __syncwarp();
    if (lane < c.n) c.indices[(i64)blockIdx.x * c.n + lane] = at<int>(slots, LIST, lane);
    if (lane == 0) barrier_arrive(slots + CHOSEN, 1);
  }
  int whose = 1;  // the others' turns
#pragma unroll 1
  for (int first = 0; first < w.slots; first += SIZE) {
    if (!w.wants(first)) continue;
    if (whose == warp) {
      const auto seen = [&](int i) { return first + i < w.slots && w.age(first + i) < w.held; };
      attend(s, ring, load, false, seen, x, left, c.scale, lane);
    }
    whose = whose == WARPS - 1 ? 1 : whose + 1;
    load += 2;
  }
  end_branch(gates[2], x, out, slots, warp, lane);

  reset(x);
  barrier_wait(slots + CHOSEN, 0);
#pragma unroll 1
  for (int i = warp; i < c.n; i += WARPS) {
    const int block = at<int>(slots, LIST, i);
    if (block < 0) break;
    const int end = w.tokens - block * SIZE;
    attend(s, ring, load + 2 * i, end >= SIZE, [&](int row) { return row < end; }, x, left, c.scale, lane);
  }
  end_branch(gates[1], x, out, slots, warp, lane);

  const int row = warp * 2 + lane / 16;
  if (row < c.group) {
    u32* o = reinterpret_cast<u32*>(c.o + ((i64)w.batch * c.heads + w.hk * c.group + row) * DV) + lane % 16;
#pragma unroll
    for (int chunk = 0; chunk < DV / PART; chunk++) o[chunk * (PART / 2)] = pack(out[chunk][0], out[chunk][1]);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_step(const __grid_constant__ TensorMap k_cmp, const __grid_constant__ TensorMap v_cmp, const __grid_constant__ TensorMap k_slc,
            const __grid_constant__ TensorMap v_slc, const __grid_constant__ TensorMap k_win, const __grid_constant__ TensorMap v_win,
            const __grid_constant__ Call c) {
  extern __shared__ unsigned char memory[];
  Ring<SLOTS> ring(memory, BARRIERS, c.zero);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (threadIdx.x == 0) barrier_init(ring.slots + CHOSEN, 1);
  ring.begin(WARPS);
  wait_for_inputs();  // the launch before may not have ended
  // Registers move only within what the CTA was given: 12 warps of 168.
  if (warp >= WARPS) {
    fewer_registers<24>();
    if (warp == WARPS) load_all(ring, {&k_cmp, &v_cmp}, {&k_slc, &v_slc}, {&k_win, &v_win}, c, lane);
  } else {
    more_registers<240>();
    multiply(ring, c, warp, lane);
  }
}
