// The n blocks of every query: the forced ones, then the most important, ties to the lowest. A warp for each row, whose importance it
// holds in registers.
//
// The forced blocks are known by their numbers, so only those between them are ranked. Importance is never negative: its bits as an
// integer rank like its value. The highest rank of each lane gives a bound that the blocks to choose reach, and few others: these few
// go to a lane each, where sorting finds the last that is chosen. Only where many are level is the bound raised by bisection.
#include "instructions.cuh"

namespace {

constexpr int WARPS = 8;         // of a CTA, a row each
constexpr int CHUNK = 32 * 4;    // blocks that a warp loads at once
constexpr u32 EVERY = ~0u;       // lane
static_assert(TILE % WARPS == 0);

}  // namespace

// The arguments. `Spans` and `Tiles` are in kernels/triton/sequence.py.
struct Call {
  const float* importance;  // [rows from tile0 on, HK, blocks], aligned to 16 bytes
  int* out;                 // [B, rows, HK, n]
  const int* tile_seq;      // [tiles], null unless packed
  const int* tile_first;    // [num_seqs + 1], null unless packed
  const int* table;         // [num_seqs + 1, 6], or null: q_len and offset hold for all
  u32 per_seq;
  int q_len, offset;
  int rows, kv_heads;       // rows of q
  int tile0, blocks;        // blocks a multiple of 4
  int seen;                 // blocks that are ranked, at most
  int size, n, num_initial, num_local;
  int beside;               // the next launch may start
};

namespace {

// The lanes' keys, in descending order.
__device__ __forceinline__ int sorted(int key, int lane) {
#pragma unroll
  for (int k = 2; k <= 32; k *= 2)
#pragma unroll
    for (int d = k / 2; d > 0; d /= 2) {
      const int other = __shfl_xor_sync(EVERY, key, d);
      const bool larger = !(lane & d) == !(lane & k);  // of the two is this lane's
      if ((other > key) == larger) key = other;
    }
  return key;
}

// The sum of what lanes ahead have; `total` is increased by that of all, and begins the sum.
__device__ __forceinline__ int sum_ahead(int own, int& total, int lane) {
  int upto = own;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(EVERY, upto, d);
    if (lane >= d) upto += other;
  }
  const int before = total + upto - own;
  total += __shfl_sync(EVERY, upto, 31);
  return before;
}

// A lane's bits of 8 chunks, 4 each, to the word of the 32 blocks from 32 * lane on.
__device__ __forceinline__ u32 by_block(u32 bits, int lane) {
  // Of 8 lanes, which load 32 blocks at once, each takes those of one chunk.
#pragma unroll
  for (int d = 4; d > 0; d /= 2) {
    const u32 high = d == 4 ? 0xffff0000 : d == 2 ? 0xff00ff00 : 0xf0f0f0f0;
    const u32 other = __shfl_xor_sync(EVERY, bits, d), kept = lane & d ? high : ~high;
    bits = (bits & kept) | (__funnelshift_l(other, other, lane & d ? 32 - 4 * d : 4 * d) & ~kept);
  }
  return __shfl_sync(EVERY, bits, (lane & 3) * 8 + lane / 4);
}

// The keys of a row's blocks from `first` to before `end`, which are ranked, CHUNKS * CHUNK at most: in a lane 4 of each chunk.
template <int CHUNKS>
struct Row {
  static constexpr int WORDS = (CHUNKS + 7) / 8;  // of a bit for each of a lane's blocks
  int key[CHUNKS][4];
  int end;

  __device__ __forceinline__ void load(const float* from, int lane) {
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
      if (i * CHUNK + lane * 4 < end) {
        const int4 x = *reinterpret_cast<const int4*>(from + i * CHUNK + lane * 4);
        key[i][0] = x.x, key[i][1] = x.y, key[i][2] = x.z, key[i][3] = x.w;
      }
  }

  // The lane's highest key; those of blocks that are not ranked become -1. `first` is in the first chunk.
  __device__ __forceinline__ int highest(int first, int lane) {
    int most = -1;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      if (i * CHUNK >= end) break;
      if (i == 0 || (i + 1) * CHUNK > end) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int j = i * CHUNK + lane * 4 + e;
          if (j < first || j >= end) key[i][e] = -1;
        }
      }
      most = max(most, max(max(key[i][0], key[i][1]), max(key[i][2], key[i][3])));
    }
    return most;
  }

  // Of the lane's blocks, those whose key is over `bound`, which is -1 or more.
  __device__ __forceinline__ void over(int bound, u32 (&bits)[WORDS]) const {
#pragma unroll
    for (int w = 0; w < WORDS; w++) bits[w] = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      if (i * CHUNK >= end) break;
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (key[i][e] > bound) bits[i / 8] |= 1u << (i % 8 * 4 + e);
    }
  }
};

template <int WORDS>
__device__ __forceinline__ int count(const u32 (&bits)[WORDS]) {  // of all lanes
  int own = 0;
#pragma unroll
  for (int w = 0; w < WORDS; w++) own += __popc(bits[w]);
  return __reduce_add_sync(EVERY, own);
}

// Choose `wanted` blocks of a row, 1 to 32, of which it has more: in ascending order to `out`. `list` has room for 32.
template <int CHUNKS>
__device__ __forceinline__ void choose(Row<CHUNKS>& row, const float* from, int first, int wanted, int* list, int* out, int lane) {
  constexpr int WORDS = Row<CHUNKS>::WORDS;
  const u32 ahead = (1u << lane) - 1;
  const int order = sorted(row.highest(first, lane), lane);
  // `wanted` or more are over `low`, as many lanes' highest are, and fewer over `high`.
  int low = max(__shfl_sync(EVERY, order, wanted - 1) - 1, -1), high = __shfl_sync(EVERY, order, 0);
  u32 bits[WORDS];
  row.over(low, bits);
  int found = count(bits);
  if (found > 32) {
    while (found > 32 && (u32)high - low > 1) {
      const int trial = low + ((u32)high - low) / 2;
      row.over(trial, bits);
      const int some = count(bits);
      if (some >= wanted) low = trial, found = some;
      else high = trial;
    }
    row.over(low, bits);
  }
#pragma unroll
  for (int w = 0; w < WORDS; w++) bits[w] = by_block(bits[w], lane);
  if (found > 32) {  // many at `high`: the lowest of them fill the places that are left
    u32 above[WORDS];
    row.over(high, above);
    const int places = wanted - count(above);
    int level = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      above[w] = by_block(above[w], lane);
      bits[w] &= ~above[w];
      int mine = __popc(bits[w]);
      const int most = places - sum_ahead(mine, level, lane);
      for (; mine > 0 && mine > most; mine--) bits[w] &= ~(0x80000000 >> __clz(bits[w]));
      bits[w] |= above[w];
    }
    found = wanted;
  }
  int listed = 0;
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    int place = sum_ahead(__popc(bits[w]), listed, lane);
    for (u32 rest = bits[w]; rest; rest &= rest - 1) list[place++] = (w * 32 + lane) * 32 + __ffs(rest) - 1;
  }
  __syncwarp();
  const int j = lane < found ? list[lane] : 0;
  bool chosen = lane < found;
  if (found > wanted) {
    const int key = chosen ? __float_as_int(from[j]) : -1;  // anew: registers have no numbers
    const int last = __shfl_sync(EVERY, sorted(key, lane), wanted - 1);
    const int places = wanted - __popc(__ballot_sync(EVERY, key > last));
    const u32 level = __ballot_sync(EVERY, key == last);
    chosen = key > last || (key == last && __popc(level & ahead) < places);
  }
  const u32 all = __ballot_sync(EVERY, chosen);
  if (chosen) out[__popc(all & ahead)] = j;
}

template <int CHUNKS>
__device__ __forceinline__ void rank(const Call& c) {
  __shared__ int lists[WARPS][32];
  if (c.beside) dependents_may_start();
  const int warp = __shfl_sync(EVERY, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, hk = blockIdx.y;
  const int number = blockIdx.x / (TILE / WARPS), within = blockIdx.x % (TILE / WARPS) * WARPS + warp;
  u32 tile = c.tile0 + number, seq;
  if (c.tile_seq) {
    seq = c.tile_seq[tile];
    tile -= c.tile_first[seq];
  } else {
    seq = tile / c.per_seq;
    tile %= c.per_seq;
  }
  int batch = seq, q_row = 0, q_len = c.q_len, offset = c.offset;
  if (c.table) {
    const int* span = c.table + (i64)seq * 6;
    batch = span[0], q_row = span[1], q_len = span[2], offset = span[5];
  }
  const int query = (int)tile * TILE + within;
  if (query >= q_len) return;
  const int own = min((offset + query) / c.size, c.seen - 1);  // less where lengths are wrong
  // An int counts the rows: a row of q has many times the elements, and memory an end.
  int* out = c.out + (i64)((batch * c.rows + q_row + query) * c.kv_heads + hk) * c.n;
  if (own < c.n) {
    if (lane < c.n) out[lane] = lane <= own ? lane : -1;
    return;
  }
  const float* from = c.importance + (i64)((number * TILE + within) * c.kv_heads + hk) * c.blocks;
  const int wanted = c.n - c.num_initial - c.num_local;
  Row<CHUNKS> row;
  row.end = own + 1 - c.num_local;
  if (wanted > 0) row.load(from, lane);
  if (lane < c.num_initial) out[lane] = lane;
  else if (lane >= c.num_initial + wanted && lane < c.n) out[lane] = own - (c.n - 1 - lane);
  if (wanted > 0) choose(row, from, c.num_initial, wanted, lists[warp], out + c.num_initial, lane);
}

}  // namespace

// By the blocks that are ranked at most.
extern "C" __global__ void __launch_bounds__(WARPS * 32) top_n_512(const Call c) { rank<512 / CHUNK>(c); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) top_n_1024(const Call c) { rank<1024 / CHUNK>(c); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) top_n_2048(const Call c) { rank<2048 / CHUNK>(c); }
