// The lists of selected_lists.cuh out of the selection.
#pragma once
#include "selected_lists.cuh"

namespace {

struct Place {  // of a tile's first query
  int batch, q_row, start, k_row, k_len, position;
  int queries;  // of the tile
};

template <int R>
__device__ __forceinline__ Place place_of(const Lists& c, int tile) {
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
  return {batch, q_row, start, k_row, k_len, offset + start, max(0, min(R, q_len - start))};
}

// The block in a slot of the tile's query, or one that no query has, which is negative.
__device__ __forceinline__ int block_in(const Lists& c, const Place& at, int query, int slot, int hk) {
  if (query >= at.queries || slot >= c.width) return -1;
  return c.indices[(((i64)at.batch * c.rows + at.q_row + at.start + query) * c.kv_heads + hk) * c.width + slot];
}
__device__ __forceinline__ bool is_seen(const Place& at, int query, int block) {
  const int position = at.position + query;
  return block >= 0 && position >= 0 && block <= position / SIZE && block < (at.k_len + SIZE - 1) / SIZE;
}

// Bits that are set in the words ahead of each word, by a warp; returns all that are.
__device__ __forceinline__ int count_ahead(const u32* bits, u32* before, int words, int lane) {
  int sum = 0;
  for (int i = 0; i < words; i += 32) {
    const int own = i + lane < words ? __popc(bits[i + lane]) : 0;
    int upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    if (i + lane < words) before[i + lane] = sum + upto - own;
    sum += __shfl_sync(~0u, upto, 31);
  }
  return sum;
}
__device__ __forceinline__ u32 rank_of(int bit, const u32* bits, const u32* before) {
  return before[bit >> 5] + __popc(bits[bit >> 5] & ((1u << (bit & 31)) - 1));
}

__device__ __forceinline__ void write_head(u32* head, const Lists& c, const Place& at, int total, int hk) {
  head[COUNT] = total;
  head[BATCH] = at.batch;
  head[ROW] = at.q_row + at.start;
  head[QUERIES] = at.queries;
  head[K_ROW] = at.k_row;
  head[END] = c.covers_keys ? 0x7fffffff : at.k_len;  // past it lies what must not be read
  head[POSITION] = at.position;
  head[KV_HEAD] = hk;
}

// Of a tile in whose warps each has one query: a thread for each slot.
template <int R>
__device__ __forceinline__ void list_one(const Lists& c, u32* bits) {
  using In = Item<R>;
  u32* before = bits + c.words;
  __shared__ u32 wanted[R * WIDTH];
  __shared__ int total;
  const int tid = threadIdx.x, lane = tid & 31, slot = tid & 15, half = lane & 16, tile = blockIdx.x, hk = blockIdx.y;
  const Place at = place_of<R>(c, tile);
  const int query = tid / WIDTH;
  for (int i = tid; i < c.words; i += R * WIDTH) bits[i] = 0;
  wanted[tid] = 0;
  const int block = block_in(c, at, query, slot, hk);
  bool mine = is_seen(at, query, block);
#pragma unroll
  for (int d = 1; d < WIDTH; d++) {  // named twice counts once
    const int other = __shfl_sync(~0u, block, half | ((slot - d) & 15));
    if (slot >= d && other == block) mine = false;
  }
  __syncthreads();
  if (mine) atomicOr(&bits[block >> 5], 1u << (block & 31));
  __syncthreads();
  if (tid < 32) {
    const int sum = count_ahead(bits, before, c.words, lane);
    if (lane == 0) total = sum;
  }
  __syncthreads();
  const u32 place = mine ? rank_of(block, bits, before) : 0xffffu;
  if (mine) atomicAdd(&wanted[place], 1u);
  __syncthreads();
  u32* item = c.lists + ((i64)hk * c.tiles + c.tiles - 1 - tile) * In::WORDS;  // the last see most: they go first
  if (mine) item[In::UNION + place] = block | wanted[place] << 24;
  const u32 key = mine ? place : 0x10000u + lane;
  int rank = 0;
#pragma unroll
  for (int d = 0; d < WIDTH; d++) rank += __shfl_sync(~0u, key, half | d) < key;
  item[In::OWN + tid - lane + half + rank] = mine ? (block | place << 20 | 1u << 29) : 0;
  if (tid == 0) write_head(item + In::HEAD, c, at, total, hk);
}

// Of a tile in whose warps each has several queries: a warp for each, with their slots.
template <int R>
__device__ __forceinline__ void list_several(const Lists& c, u32* bits) {
  using In = Item<R>;
  constexpr int WARPS = R / Q, THREADS = WARPS * 32, PLACES = R * WIDTH / 32, EACH = Q * WIDTH / 32;  // EACH slots a lane
  u32* before = bits + c.words;
  __shared__ u32 wanted[R * WIDTH];                                   // by how many warps, by place in the union
  __shared__ u32 own_bits[WARPS][PLACES], own_before[WARPS][PLACES];  // of a warp, the places of what it wants
  __shared__ u32 queries[WARPS][Q * WIDTH];                           // that want it, by place in the warp's list
  __shared__ int total;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, tile = blockIdx.x, hk = blockIdx.y;
  const Place at = place_of<R>(c, tile);
  for (int i = tid; i < c.words; i += THREADS) bits[i] = 0;
  for (int i = tid; i < R * WIDTH; i += THREADS) wanted[i] = 0;
  for (int i = lane; i < PLACES; i += 32) own_bits[warp][i] = 0;
  for (int i = lane; i < Q * WIDTH; i += 32) queries[warp][i] = 0;
  int block[EACH], place[EACH], rank[EACH];
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int query = warp * Q + n * 2 + lane / WIDTH;
    block[n] = block_in(c, at, query, lane % WIDTH, hk);
    if (!is_seen(at, query, block[n])) block[n] = -1;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < EACH; n++)
    if (block[n] >= 0) atomicOr(&bits[block[n] >> 5], 1u << (block[n] & 31));
  __syncthreads();
  if (warp == 0) {
    const int sum = count_ahead(bits, before, c.words, lane);
    if (lane == 0) total = sum;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < EACH; n++)
    if (block[n] >= 0) {
      place[n] = rank_of(block[n], bits, before);
      atomicOr(&own_bits[warp][place[n] >> 5], 1u << (place[n] & 31));
    }
  __syncwarp();
  const int entries = count_ahead(own_bits[warp], own_before[warp], PLACES, lane);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < EACH; n++)
    if (block[n] >= 0) {
      rank[n] = rank_of(place[n], own_bits[warp], own_before[warp]);
      // Of those that name the block, in whatever slots, the first to come writes.
      if (atomicOr(&queries[warp][rank[n]], 1u << (n * 2 + lane / WIDTH)) == 0) atomicAdd(&wanted[place[n]], 1u);
      else block[n] = -1;
    }
  __syncthreads();
  u32* item = c.lists + ((i64)hk * c.tiles + c.tiles - 1 - tile) * In::WORDS;  // the last see most: they go first
  u32* own = item + In::OWN + warp * In::OWN_WORDS;
#pragma unroll
  for (int n = 0; n < EACH; n++)
    if (block[n] >= 0) {
      item[In::UNION + place[n]] = block[n] | wanted[place[n]] << 24;
      own[2 * rank[n]] = block[n];
      own[2 * rank[n] + 1] = place[n] | queries[warp][rank[n]] << 16;
    }
  if (lane == 0 && entries < Q * WIDTH) own[2 * entries + 1] = 0;
  if (tid == 0) write_head(item + In::HEAD, c, at, total, hk);
}

template <int R>
constexpr int LIST_THREADS = Q == 1 ? R * WIDTH : R / Q * 32;

// A CTA for each tile and KV head; 2 * words of dynamic shared memory, for the union and the blocks in the words ahead.
template <int R>
__device__ __forceinline__ void make_lists(const Lists& c) {
  extern __shared__ u32 bits[];
  if constexpr (Q == 1) list_one<R>(c, bits);
  else list_several<R>(c, bits);
}

}  // namespace
