// What the warps of a tile walk along: the blocks that any of its R neighbouring queries of a KV head selected, and for each warp,
// which has QPW of the queries, those that they selected.
#pragma once
#include "tiles.cuh"

namespace {

constexpr int WIDTH = 16;  // blocks that a query has at most

// The lists of a tile, `WORDS` words, in the order in which the tiles are computed:
// R * WIDTH words of the union, each a block | warps that want it << 24;
// for each warp QPW * WIDTH words, each a block | its place in the union << 20 | which queries want it << 29, by place, then 0;
// and the head, where the tile lies.
template <int R>
struct Item {
  static constexpr int UNION = 0, OWN = R * WIDTH, HEAD = 2 * R * WIDTH, WORDS = HEAD + 8;
  static_assert(R * WIDTH <= 256, "a place has 9 bits");
};
enum Head { COUNT, BATCH, ROW, QUERIES, K_ROW, END, POSITION, KV_HEAD };

}  // namespace

// Where sequences lie, and what their queries selected. `Span`'s half of a launch is in kernels/triton/sequence.py.
struct Lists {
  const int* tile_seq;    // [tiles], null unless packed
  const int* tile_first;  // [num_seqs + 1], null unless packed
  const int* table;       // [num_seqs + 1, 6], or null: q_len, k_len and offset hold for all
  int per_seq, q_len, k_len, offset;
  int rows, tiles, heads, kv_heads;  // rows of q
  int covers_keys;        // no row of the keys is outside of all sequences
  int width, words;       // blocks a query, and words of a bit for each block
  const int* indices;     // [B, rows, HK, width]
  u32* lists;             // [HK * tiles, WORDS]
};

namespace {

// A CTA of R * WIDTH threads for each tile and KV head, a thread for each slot; 2 * words of dynamic shared memory.
template <int R, int QPW>
__device__ __forceinline__ void make_lists(const Lists& c) {
  static_assert(QPW == 1 || QPW == 2, "half a warp of threads is a query");
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
  u32 which = mine;
  if constexpr (QPW == 2) {  // the lower half of the lanes is the warp's first query; what both want stands in its list, for both
    bool both = false;
#pragma unroll
    for (int d = 0; d < WIDTH; d++) both |= __shfl_sync(~0u, place, (half ^ 16) | d) == place;
    which = !mine ? 0 : half ? (both ? 0 : 2) : (both ? 3 : 1);
  }
  const bool keep = which != 0;
  if (keep) atomicAdd(&wanted[place], 1u);
  __syncthreads();
  using In = Item<R>;
  u32* item = c.lists + ((i64)hk * c.tiles + c.tiles - 1 - tile) * In::WORDS;  // the last see most: they go first
  if (keep) item[In::UNION + place] = block | wanted[place] << 24;
  const u32 key = keep ? place : 0x10000u + lane;
  const int first = QPW == 2 ? 0 : half;  // lane of the warp's list
  int rank = 0;
#pragma unroll
  for (int d = 0; d < QPW * WIDTH; d++) rank += __shfl_sync(~0u, key, first | d) < key;
  item[In::OWN + tid - lane + first + rank] = keep ? (block | place << 20 | which << 29) : 0;
  if (tid == 0) {
    item[In::HEAD + COUNT] = total;
    item[In::HEAD + BATCH] = batch;
    item[In::HEAD + ROW] = q_row + start;
    item[In::HEAD + QUERIES] = queries;
    item[In::HEAD + K_ROW] = k_row;
    item[In::HEAD + END] = c.covers_keys ? 0x7fffffff : k_len;  // past it lies what must not be read
    item[In::HEAD + POSITION] = offset + start;
    item[In::HEAD + KV_HEAD] = hk;
  }
}

// Words of a tile's head, one a lane.
template <int R>
__device__ __forceinline__ u32 head_of(const Lists& c, int i, int items, int lane) {
  return i < items ? c.lists[(i64)i * Item<R>::WORDS + Item<R>::HEAD + (lane & 7)] : 0;
}
__device__ __forceinline__ int word(u32 head, Head which) { return (int)__shfl_sync(~0u, head, which); }

}  // namespace
