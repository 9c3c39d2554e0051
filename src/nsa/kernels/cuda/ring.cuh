// A ring of tiles in shared memory: a warp loads them, others walk their own lists of them and never touch what they don't want.
#pragma once
#include "selected_lists.cuh"

namespace {

constexpr int ROOM = 224 << 10;  // for the ring's tiles, and whatever follows them ahead of the barriers

// Slots of the size of a block's keys and of its values take turns: where these sizes differ, keys are an even load, values an odd
// one. After the ring's tiles, and whatever follows them at `barriers`, lie the barriers and the number of loads begun.
template <int SLOTS>
struct Ring {
  static constexpr int BYTES = SLOTS / 2 * (K_BYTES + V_BYTES);
  static_assert(SLOTS % 2 == 0);
  u32 slots, full, empty, issued;  // shared addresses
  u32 zero;                        // 0, unknown to the compiler
  u32 seen;                        // what was last read of `issued`, the number of loads that the loading warp has begun

  __device__ __forceinline__ Ring(const void* memory, int barriers, u32 zero) {
    slots = (shared_address(memory) + 1023) & ~1023u;  // what the swizzle counts from
    full = slots + barriers;
    empty = full + SLOTS * 8;
    issued = empty + SLOTS * 8;
    this->zero = zero;
    seen = 0;
  }
  __device__ __forceinline__ u32 tile(u32 slot) const {
    return slots + slot * ((K_BYTES + V_BYTES) / 2) + (slot & 1) * ((K_BYTES - V_BYTES) / 2);
  }
  // By all threads of the CTA. `warps` leave every slot, or the loading warp does so for them.
  __device__ __forceinline__ void begin(int warps) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < SLOTS; i++) {
        barrier_init(full + i * 8, 1);
        barrier_init(empty + i * 8, warps);
      }
      store_volatile(issued, 0);
      barriers_visible();
    }
    __syncthreads();
  }

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

// The loading warp's place in the ring.
template <int SLOTS>
struct Loads {
  const Ring<SLOTS>& ring;
  int lane;
  u32 slot, parity, begun;

  __device__ __forceinline__ Loads(const Ring<SLOTS>& ring, int lane) : ring(ring), lane(lane), slot(0), parity(1), begun(0) {}

  // The next load, `bytes` in boxes by `boxes(to, full)`; of the warps, `others` don't want it.
  template <class Boxes>
  __device__ __forceinline__ void next(int others, int bytes, Boxes boxes) {
    barrier_wait(ring.empty + slot * 8, parity);
    if (lane == 0) {
      const u32 full = ring.full + slot * 8, to = ring.tile(slot);
      if (others > 0) barrier_arrive(ring.empty + slot * 8, others);
      barrier_expect(full, bytes);
      boxes(to, full);
      store_volatile(ring.issued, ++begun);
    }
    __syncwarp();
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

// What the loading warp does: of every tile of the CTA the blocks of the union, keys and values of each, behind what `ahead(loads,
// head)` loads for the tile. NVRTC takes a lambda with `auto` among its arguments for a host function.
template <int R, int WARPS, int SLOTS, class Ahead>
__device__ __forceinline__ void load_blocks(const Ring<SLOTS>& ring, const TensorMap* k_map, const TensorMap* v_map, const Lists& c,
                                            int lane, Ahead ahead) {
  using In = Item<R>;
  const int items = c.tiles * c.kv_heads;
  Loads<SLOTS> loads(ring, lane);
  int i = blockIdx.x, from = 0;  // 32 words of the union at a time, those of the next loop loaded in this one
  u32 head = head_words<R>(c, i, items, lane), part = c.lists[(i64)i * In::WORDS + In::UNION + lane];
  while (i < items) {
    const int count = word(head, COUNT), batch = word(head, BATCH), k_row = word(head, K_ROW), hk = word(head, KV_HEAD);
    const int some = min(32, count - from);
    const u32 now = part, now_head = head;
    const bool begins = from == 0;
    from += 32;
    if (from >= count) {
      from = 0;
      i += gridDim.x;
      head = head_words<R>(c, i, items, lane);
    }
    if (i < items) part = c.lists[(i64)i * In::WORDS + In::UNION + from + lane];
    if (begins) ahead(loads, now_head);
    for (int e = 0; e < some; e++) {
      const u32 entry = __shfl_sync(~0u, now, e);
      const int row = k_row + (int)(entry & 0xffffff) * SIZE, others = WARPS - (int)(entry >> 24);
#pragma unroll
      for (int values = 0; values < 2; values++) {
        const TensorMap* map = values ? v_map : k_map;
        const int columns = values ? DV : D;
        loads.next(others, values ? V_BYTES : K_BYTES, [&](u32 to, u32 full) {
#pragma unroll
          for (int column = 0; column < columns; column += COLUMNS)
            load_box(to + column / COLUMNS * BOX_BYTES, map, full, column, hk, row, batch);
        });
      }
    }
  }
}

}  // namespace
