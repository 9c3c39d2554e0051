/* Defaults, and every rule of a configuration. */
#include <math.h>

#include "check.h"
#include "nsa/nsa.h"

static NSAConfig base(void) {
    NSAConfig config = nsa_create_default_config(64, 8);
    config.max_seq_len = 4096;
    return config;
}

static void test_defaults(void) {
    const NSAConfig c = nsa_create_default_config(64, 8);
    CHECK_EQUAL(c.head_dim, 64);
    CHECK_EQUAL(c.num_heads, 8);
    CHECK_EQUAL(c.num_kv_heads, 1);
    CHECK_EQUAL(c.value_dim, 64);
    CHECK_EQUAL(c.block_length, 32);
    CHECK_EQUAL(c.block_stride, 16);
    CHECK_EQUAL(c.selection_block_size, 64);
    CHECK_EQUAL(c.num_selected_blocks, 16);
    CHECK_EQUAL(c.num_initial_blocks, 1);
    CHECK_EQUAL(c.num_local_blocks, 2);
    CHECK_EQUAL(c.window_size, 512);
    CHECK_EQUAL(c.dtype, NSA_DTYPE_FP32);
    CHECK_EQUAL(c.incremental, 0);
    CHECK_EQUAL(c.device, -1);
    CHECK(fabs(c.softmax_scale - 0.125) < 1e-15);
    /* The largest divisor of num_heads that is at most max(1, num_heads / 16). */
    const int heads[][2] = {{1, 1}, {16, 1}, {31, 1}, {32, 2}, {48, 3}, {64, 4}, {80, 5}, {96, 6}, {100, 5}, {7 * 16, 7}, {127, 1}};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        CHECK_EQUAL(nsa_create_default_config(64, heads[i][0]).num_kv_heads, heads[i][1]);
}

static void refuse(NSAConfig config, const char *why) {
    NSAContext ctx;
    size_t bytes = 1;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_TEXT(nsa_last_error(&ctx), why);
    CHECK_EQUAL(nsa_free(&ctx), NSA_OK);
    CHECK_EQUAL(nsa_workspace_size(&ctx, &config, &bytes), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_TEXT(nsa_last_error(&ctx), why);
    CHECK_EQUAL(bytes, 0);
}

#define REFUSE(field, value, why)                                                                                              \
    do {                                                                                                                       \
        NSAConfig config = base();                                                                                             \
        config.field = value;                                                                                                  \
        refuse(config, why);                                                                                                   \
    } while (0)

static void test_rules(void) {
    REFUSE(struct_size, 0, "struct_size must be");
    REFUSE(head_dim, 0, "head_dim must be positive, got 0");
    REFUSE(head_dim, 1 << 20, "head_dim must be at most 65536, got 1048576");
    REFUSE(num_heads, -3, "num_heads must be positive, got -3");
    REFUSE(num_heads, 65536, "num_heads must be at most 65535, got 65536");
    REFUSE(num_kv_heads, 0, "num_kv_heads must be positive, got 0");
    REFUSE(num_kv_heads, 3, "num_kv_heads must divide num_heads=8, got 3");
    REFUSE(value_dim, 0, "value_dim must be positive, got 0");
    REFUSE(block_length, 0, "block_length must be positive, got 0");
    REFUSE(block_length, 24, "block_length must be a multiple of block_stride=16, got 24");
    REFUSE(block_length, 128, "block_length must be at most selection_block_size=64, got 128");
    REFUSE(block_stride, 0, "block_stride must be positive, got 0");
    REFUSE(selection_block_size, 0, "selection_block_size must be positive, got 0");
    REFUSE(selection_block_size, 72, "selection_block_size must be a multiple of block_stride=16, got 72");
    REFUSE(num_selected_blocks, 2, "num_selected_blocks must be at least num_initial_blocks + num_local_blocks = 3, got 2");
    REFUSE(num_initial_blocks, 0, "num_initial_blocks must be positive, got 0");
    REFUSE(num_local_blocks, 0, "num_local_blocks must be positive, got 0");
    REFUSE(window_size, 0, "window_size must be positive, got 0");
    REFUSE(window_size, 2147483647, "window_size must be at most 1073741824, got 2147483647");
    REFUSE(max_seq_len, 0, "max_seq_len must be positive, got 0");
    REFUSE(softmax_scale, 0, "softmax_scale must be positive and finite, got 0");
    REFUSE(softmax_scale, -1, "softmax_scale must be positive and finite, got -1");
    REFUSE(softmax_scale, HUGE_VAL, "softmax_scale must be positive and finite, got inf");
    REFUSE(softmax_scale, NAN, "softmax_scale must be positive and finite, got");
    REFUSE(dtype, 3, "dtype must be an NSADtype, got 3");
    REFUSE(incremental, 2, "incremental must be 0 or 1, got 2");
    REFUSE(device, -2, "device must be -1 or the number of a device, got -2");
    refuse(nsa_create_default_config(0, 0), "head_dim must be positive, got 0");
    refuse(nsa_create_default_config(64, -1), "num_heads must be positive, got -1");
}

static void test_names(void) {
    CHECK(!strcmp(nsa_error_name(NSA_OK), "NSA_OK"));
    CHECK(!strcmp(nsa_error_name(NSA_ERROR_NO_DEVICE), "NSA_ERROR_NO_DEVICE"));
    CHECK(!strcmp(nsa_error_name(NSA_ERROR_CUDA), "NSA_ERROR_CUDA"));
    CHECK(!strcmp(nsa_error_name(99), "not an NSAError"));
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", NSA_VERSION_MAJOR, NSA_VERSION_MINOR, NSA_VERSION_PATCH);
    CHECK(!strcmp(nsa_version(), version));
}

int main(void) {
    test_defaults();
    test_rules();
    test_names();
    return failures != 0;
}
