/* Where the fields of the public structs lie: what a binding of another language relies on. */
#ifndef LAYOUT_H
#define LAYOUT_H

#include <stddef.h>

#include "nsa/nsa.h"

#define NSA_LAYOUT(X)                                                                                                          \
    X(NSAConfig, struct_size, 0)                                                                                               \
    X(NSAConfig, head_dim, 4)                                                                                                  \
    X(NSAConfig, num_heads, 8)                                                                                                 \
    X(NSAConfig, num_kv_heads, 12)                                                                                             \
    X(NSAConfig, value_dim, 16)                                                                                                \
    X(NSAConfig, block_length, 20)                                                                                             \
    X(NSAConfig, block_stride, 24)                                                                                             \
    X(NSAConfig, selection_block_size, 28)                                                                                     \
    X(NSAConfig, num_selected_blocks, 32)                                                                                      \
    X(NSAConfig, num_initial_blocks, 36)                                                                                       \
    X(NSAConfig, num_local_blocks, 40)                                                                                         \
    X(NSAConfig, window_size, 44)                                                                                              \
    X(NSAConfig, dtype, 48)                                                                                                    \
    X(NSAConfig, max_seq_len, 52)                                                                                              \
    X(NSAConfig, incremental, 56)                                                                                              \
    X(NSAConfig, device, 60)                                                                                                   \
    X(NSAConfig, softmax_scale, 64)                                                                                            \
    X(NSAContext, state, 0)                                                                                                    \
    X(NSAContext, check, 8)                                                                                                    \
    X(NSAContext, error, 16)                                                                                                   \
    X(NSACompressionWeights, embedding, 0)                                                                                     \
    X(NSACompressionWeights, w1, 8)                                                                                            \
    X(NSACompressionWeights, w2, 16)                                                                                           \
    X(NSACompressionWeights, hidden, 24)

#endif
