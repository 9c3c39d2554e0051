// What the warps of a tile walk along: the blocks that any of its R neighbouring queries of a KV head selected, and for each warp,
// which has Q of the queries, those that they selected.
#pragma once
#include "tiles.cuh"

namespace {

constexpr int WIDTH = 16;  // blocks that a query has at most

// The lists of a tile, `WORDS` words, in the order in which the tiles are computed:
// R * WIDTH words of the union, each a block | warps that want it << 24;
// for each warp OWN_WORDS of its own list, by place in the union: of one query a word for each of its blocks, a block | its place in
// the union << 20 | 1 << 29, then 0; of several queries two words, a block, and its place | which queries want it << 16, then 0;
// and the head, where the tile lies.
template <int R>
struct Item {
  static constexpr int OWN_WORDS = (Q == 1 ? 1 : 2) * Q * WIDTH;
  static constexpr int UNION = 0, OWN = R * WIDTH, HEAD = OWN + R / Q * OWN_WORDS, WORDS = HEAD + 8;
  static_assert(R % Q == 0 && R * WIDTH <= (Q == 1 ? 1 << 9 : 1 << 16), "a place has 9 or 16 bits");
  static_assert(WORDS % 2 == 0, "two words are loaded at once");
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

// Words of a tile's head, one a lane.
template <int R>
__device__ __forceinline__ u32 head_words(const Lists& c, int i, int items, int lane) {
  return i < items ? c.lists[(i64)i * Item<R>::WORDS + Item<R>::HEAD + (lane & 7)] : 0;
}
__device__ __forceinline__ int word(u32 head, Head which) { return (int)__shfl_sync(~0u, head, which); }

// A warp's way along its own list of a tile, of MOST entries at most: step `e` gives entry e, or behind the last one one that ends.
// An entry has a block, its place in the union, and a bit for each query that wants it.
template <int R, int N = Q>
struct Walk {  // of several queries: 32 entries at a time, one a lane
  static constexpr int MOST = N * WIDTH;
  struct Entry {
    u32 first, second;
    __device__ __forceinline__ bool ends() const { return second == 0; }
    __device__ __forceinline__ int block() const { return (int)first; }
    __device__ __forceinline__ u32 place() const { return second & 0xffff; }
    __device__ __forceinline__ u32 queries() const { return second >> 16; }
  };
  const uint2* own;  // the lane's
  uint2 some;

  __device__ __forceinline__ void begin(const Lists& c, int i, int warp, int lane) {
    own = reinterpret_cast<const uint2*>(c.lists + (i64)i * Item<R>::WORDS + Item<R>::OWN + warp * Item<R>::OWN_WORDS) + lane;
    some = *own;
  }
  __device__ __forceinline__ Entry step(int e) {
    if (MOST > 32 && e > 0 && e % 32 == 0) some = own[e];
    return {__shfl_sync(~0u, some.x, e & 31), __shfl_sync(~0u, some.y, e & 31)};
  }
};
template <int R>
struct Walk<R, 1> {  // of one query: all of it, a word a lane
  static constexpr int MOST = WIDTH;
  struct Entry {
    u32 word;
    __device__ __forceinline__ bool ends() const { return word == 0; }
    __device__ __forceinline__ int block() const { return (int)(word & 0xfffff); }
    __device__ __forceinline__ u32 place() const { return word >> 20 & 0x1ff; }
    __device__ __forceinline__ u32 queries() const { return 1; }
  };
  u32 list;

  __device__ __forceinline__ void begin(const Lists& c, int i, int warp, int lane) {
    list = lane < WIDTH ? c.lists[(i64)i * Item<R>::WORDS + Item<R>::OWN + warp * WIDTH + lane] : 0;
  }
  __device__ __forceinline__ Entry step(int e) { return {__shfl_sync(~0u, list, e)}; }
};

}  // namespace
