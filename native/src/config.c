/* The C twin of nsa/config.py: the same defaults, the same rules, the same words. */
#include "config.h"

#include <math.h>
#include <stddef.h>

#include "error.h"

/* What fits a launch's grid, and keeps products of sizes within 32 bits. */
#define MOST_HEADS 65535
#define MOST_TOKENS (1 << 20)
#define LONGEST (1 << 30)

typedef struct Field {
    const char *name;
    size_t offset;
    int most;
} Field;

static const Field positive[] = {
    {"head_dim", offsetof(NSAConfig, head_dim), 65536},
    {"num_heads", offsetof(NSAConfig, num_heads), MOST_HEADS},
    {"num_kv_heads", offsetof(NSAConfig, num_kv_heads), MOST_HEADS},
    {"value_dim", offsetof(NSAConfig, value_dim), 65536},
    {"block_length", offsetof(NSAConfig, block_length), MOST_TOKENS},
    {"block_stride", offsetof(NSAConfig, block_stride), MOST_TOKENS},
    {"selection_block_size", offsetof(NSAConfig, selection_block_size), MOST_TOKENS},
    {"num_selected_blocks", offsetof(NSAConfig, num_selected_blocks), MOST_TOKENS},
    {"num_initial_blocks", offsetof(NSAConfig, num_initial_blocks), MOST_TOKENS},
    {"num_local_blocks", offsetof(NSAConfig, num_local_blocks), MOST_TOKENS},
    {"window_size", offsetof(NSAConfig, window_size), LONGEST},
    {"max_seq_len", offsetof(NSAConfig, max_seq_len), LONGEST},
};

static int default_kv_heads(int num_heads) {
    int heads = num_heads / 16;
    while (heads > 1 && num_heads % heads)
        heads--;
    return heads > 1 ? heads : 1;
}

NSAConfig nsa_create_default_config(int head_dim, int num_heads) {
    NSAConfig config = {
        .struct_size = sizeof(NSAConfig),
        .head_dim = head_dim,
        .num_heads = num_heads,
        .num_kv_heads = default_kv_heads(num_heads),
        .value_dim = head_dim,
        .block_length = 32,
        .block_stride = 16,
        .selection_block_size = 64,
        .num_selected_blocks = 16,
        .num_initial_blocks = 1,
        .num_local_blocks = 2,
        .window_size = 512,
        .dtype = NSA_DTYPE_FP32,
        .max_seq_len = 131072,
        .incremental = 0,
        .device = -1,
        .softmax_scale = head_dim > 0 ? 1 / sqrt(head_dim) : 0,
    };
    return config;
}

static int check_divisions(const NSAConfig *c, char *message) {
    const int bad = NSA_ERROR_INVALID_ARGUMENT, forced = c->num_initial_blocks + c->num_local_blocks;
    if (c->num_heads % c->num_kv_heads)
        return nsa_fail(message, bad, "num_kv_heads must divide num_heads=%d, got %d", c->num_heads, c->num_kv_heads);
    if (c->block_length % c->block_stride)
        return nsa_fail(message, bad, "block_length must be a multiple of block_stride=%d, got %d", c->block_stride,
                        c->block_length);
    if (c->selection_block_size % c->block_stride)
        return nsa_fail(message, bad, "selection_block_size must be a multiple of block_stride=%d, got %d", c->block_stride,
                        c->selection_block_size);
    if (c->block_length > c->selection_block_size)
        return nsa_fail(message, bad, "block_length must be at most selection_block_size=%d, got %d", c->selection_block_size,
                        c->block_length);
    if (forced > c->num_selected_blocks)
        return nsa_fail(message, bad, "num_selected_blocks must be at least num_initial_blocks + num_local_blocks = %d, got %d",
                        forced, c->num_selected_blocks);
    return NSA_OK;
}

int nsa_check_config(const NSAConfig *config, char *message) {
    const int bad = NSA_ERROR_INVALID_ARGUMENT;
    if (!config)
        return nsa_fail(message, bad, "config must not be NULL");
    if (config->struct_size != sizeof *config)
        return nsa_fail(message, bad, "struct_size must be %u, as nsa_create_default_config sets it, got %u",
                        (unsigned)sizeof *config, (unsigned)config->struct_size);
    for (size_t i = 0; i < sizeof positive / sizeof *positive; i++) {
        const int value = *(const int *)((const char *)config + positive[i].offset);
        if (value < 1)
            return nsa_fail(message, bad, "%s must be positive, got %d", positive[i].name, value);
        if (value > positive[i].most)
            return nsa_fail(message, bad, "%s must be at most %d, got %d", positive[i].name, positive[i].most, value);
    }
    if (!(config->softmax_scale > 0 && config->softmax_scale < HUGE_VAL))
        return nsa_fail(message, bad, "softmax_scale must be positive and finite, got %g", config->softmax_scale);
    if (config->dtype < NSA_DTYPE_FP32 || config->dtype > NSA_DTYPE_BF16)
        return nsa_fail(message, bad, "dtype must be an NSADtype, got %d", config->dtype);
    if (config->incremental != 0 && config->incremental != 1)
        return nsa_fail(message, bad, "incremental must be 0 or 1, got %d", config->incremental);
    if (config->device < -1)
        return nsa_fail(message, bad, "device must be -1 or the number of a device, got %d", config->device);
    return check_divisions(config, message);
}

int nsa_dtype_size(int dtype) { return dtype == NSA_DTYPE_FP32 ? 4 : 2; }

const char *nsa_dtype_name(int dtype) { return dtype == NSA_DTYPE_FP32 ? "fp32" : dtype == NSA_DTYPE_FP16 ? "fp16" : "bf16"; }

int nsa_num_compressed_blocks(const NSAConfig *config, int seq_len) {
    return seq_len < config->block_length ? 0 : (seq_len - config->block_length) / config->block_stride + 1;
}
