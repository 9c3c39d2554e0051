/* Everything that a kernel's arguments can be, by the names that nsa/aot/kernels.py uses. An export that needs another does not
 * compile. Shapes are those of the docstrings of the kernels' launchers, for a batch of one sequence and one query. */
#ifndef NSA_VALUES_H
#define NSA_VALUES_H

#include <stdint.h>

/* Pointers: the caller's tensors, then the workspace's. */
#define NSA_POINTERS(X)                                                                                                        \
    X(q) X(k) X(v) X(out) X(gate_weights) X(new_k) X(new_v) X(x) X(embedding) X(w1) X(w2)                                      \
    X(k_cmp) X(v_cmp) X(k_win) X(v_win) X(gates) X(lengths) X(table) X(part_o) X(part_lse) X(weights) X(edges) X(peaks)        \
    X(importance) X(chosen) X(chosen_before) X(indices)

/* Numbers. width and value_width are those of a row of all KV heads, page_stride that of the one page that there is; k_cmp_row and
 * k_cmp_head lie between the rows of a head and between the heads of a row, and so on, out being k_cmp or v_cmp; selection is the
 * selection blocks of max_seq_len, per_block the compressed blocks that start in one, cells and per_tile how tiles are cut, count
 * what choosing again chooses from. */
#define NSA_NUMBERS(X)                                                                                                         \
    X(head_dim) X(value_dim) X(compressed_dim) X(heads) X(kv_heads) X(group) X(queries) X(max_pages) X(parts) X(splits)        \
    X(first_win) X(selected_parts) X(tiles) X(token_tiles) X(length) X(stride) X(size) X(per_block) X(cells) X(per_tile)       \
    X(selection) X(n) X(num_initial) X(num_local) X(window) X(slots) X(count) X(seq_len) X(gated) X(first) X(stop)             \
    X(hidden) X(mlp) X(first_slot) X(page_stride) X(width) X(value_width) X(k_cmp_row) X(k_cmp_head) X(v_cmp_row)              \
    X(v_cmp_head) X(out_row) X(out_head) X(scale)

#define NSA_VALUE_NAME(name) NSA_VALUE_##name,
typedef enum NSAValueName { NSA_VALUE_none, NSA_POINTERS(NSA_VALUE_NAME) NSA_NUMBERS(NSA_VALUE_NAME) NSA_NUM_VALUES } NSAValueName;
#undef NSA_VALUE_NAME

/* An argument as cuLaunchKernel reads it: a device pointer, an int, or for the scale a float. */
typedef union NSAValue {
    uint64_t pointer;
    int32_t number;
    float real;
} NSAValue;

#endif
