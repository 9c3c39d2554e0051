/* What a call launches, and with which arguments. The table tells a position's meaning; what a kernel makes of it is for the
 * tests in tests/aot, which run the kernels. */
#include <stdalign.h>

#include "check.h"
#include "fake.h"
#include "nsa/nsa.h"
#include "plan.h"

enum { SEQ_LEN = 1000, WINDOW = 96, HEADS = 8, MOST = 64 }; /* of one KV head */

static alignas(64) char query[64], keys[64], values[64], output[64], weights[64];
static Fake *fake;
static int may_depend; /* whether the driver can launch what starts early */

/* The arguments of the launches since the last clear, by name. */
static struct {
    const NSAKernel *kernel;
    NSAValue values[NSA_NUM_VALUES];
} seen[MOST];
static int num_seen;

static void on_launch(const FakeLaunch *launch, void **parameters) {
    const NSAKernel *kernel = nsa_kernels;
    while (nsa_cubins + kernel->offset != launch->image || strcmp(kernel->symbol, launch->symbol))
        kernel++;
    seen[num_seen].kernel = kernel;
    CHECK_EQUAL(launch->threads, 32 * kernel->num_warps);
    CHECK_EQUAL(launch->shared, kernel->shared);
    CHECK_EQUAL(kernel->dependent, kernel->arch >= 90);
    CHECK_EQUAL(kernel->dependent, nsa_constant(kernel, "DEPENDENT"));
    CHECK_EQUAL(launch->dependent, kernel->dependent && may_depend);
    for (int i = 0; i < kernel->num_parameters; i++) {
        const size_t bytes = kernel->parameters[i].passed == NSA_PASSED_POINTER ? 8 : 4;
        memcpy(&seen[num_seen].values[kernel->parameters[i].value], parameters[i], bytes);
    }
    for (int i = 0; i < 2; i++) /* the scratch memory that there is not */
        CHECK_EQUAL(*(uint64_t *)parameters[kernel->num_parameters + i], 0);
    num_seen++;
}

static int number(int launch, NSAValueName name) { return seen[launch].values[name].number; }
static uint64_t pointer(int launch, NSAValueName name) { return seen[launch].values[name].pointer; }
static uint64_t at(const void *x) { return (uintptr_t)x; }

static void clear(void) {
    num_seen = fake->num_launches = 0;
    memset(seen, 0, sizeof seen);
}

static NSAConfig small(void) {
    NSAConfig config = nsa_create_default_config(64, HEADS);
    config.max_seq_len = 2048;
    config.window_size = WINDOW;
    return config;
}

static void check_roles(const NSARole *roles, int count) {
    CHECK_EQUAL(num_seen, count);
    for (int i = 0; i < count && i < num_seen; i++)
        CHECK_EQUAL(seen[i].kernel->role, roles[i]);
}

static void test_a_step(void) {
    const NSAConfig config = small();
    nsa_stream_t stream = (nsa_stream_t)(void *)&fake;
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    clear();
    CHECK_EQUAL(nsa_compute_attention(&ctx, query, keys, values, SEQ_LEN, output, stream), NSA_OK);
    const NSARole roles[] = {NSA_ROLE_stream_begin, NSA_ROLE_decode_compressed, NSA_ROLE_decode_choose, NSA_ROLE_decode_tokens,
                             NSA_ROLE_decode_merge};
    check_roles(roles, 5);
    for (int i = 0; i < num_seen; i++)
        CHECK(fake->launches[i].stream == (void *)stream);
    CHECK_EQUAL(number(0, NSA_VALUE_seq_len), SEQ_LEN);
    CHECK_EQUAL(number(0, NSA_VALUE_gated), 0);
    CHECK_EQUAL(pointer(0, NSA_VALUE_q), at(query));
    CHECK_EQUAL(number(0, NSA_VALUE_first), 0);
    CHECK_EQUAL(number(0, NSA_VALUE_group), HEADS);
    CHECK_EQUAL(fake->launches[0].grid[0], 1 + (SEQ_LEN - 32) / 16 + 1);
    CHECK_EQUAL(fake->launches[0].grid[1], 1);
    CHECK_EQUAL(fake->launches[0].grid[2], 2); /* keys, values; heads, more heads */
    CHECK_EQUAL(pointer(0, NSA_VALUE_k), at(keys));
    CHECK_EQUAL(pointer(0, NSA_VALUE_v), at(values));
    CHECK_EQUAL(pointer(0, NSA_VALUE_k_cmp), pointer(1, NSA_VALUE_k_cmp));
    CHECK_EQUAL(number(1, NSA_VALUE_per_block), 4);
    CHECK_EQUAL(number(1, NSA_VALUE_cells), 1);
    CHECK(seen[1].values[NSA_VALUE_scale].real > 0.1803f && seen[1].values[NSA_VALUE_scale].real < 0.1804f);
    CHECK_EQUAL(fake->launches[1].grid[0], number(1, NSA_VALUE_splits));
    CHECK_EQUAL(pointer(2, NSA_VALUE_chosen), pointer(3, NSA_VALUE_indices));
    CHECK_EQUAL(pointer(2, NSA_VALUE_part_lse), pointer(3, NSA_VALUE_part_lse));
    CHECK_EQUAL(number(3, NSA_VALUE_window), WINDOW);
    CHECK_EQUAL(number(3, NSA_VALUE_splits), number(1, NSA_VALUE_splits));
    CHECK_EQUAL(fake->launches[3].grid[2], number(4, NSA_VALUE_parts) - number(4, NSA_VALUE_splits));
    CHECK_EQUAL(pointer(4, NSA_VALUE_gates), pointer(0, NSA_VALUE_gates));
    CHECK_EQUAL(pointer(4, NSA_VALUE_out), at(output));
    CHECK_EQUAL(fake->launches[4].grid[0], HEADS);
    /* No block has ended yet: nothing to compress. */
    clear();
    CHECK_EQUAL(nsa_compute_attention(&ctx, query, keys, values, 31, output, NULL), NSA_OK);
    check_roles(roles, 5);
    CHECK_EQUAL(fake->launches[0].grid[0], 1);
    nsa_free(&ctx);
}

static void compute(NSAContext *ctx, int seq_len) {
    clear();
    CHECK_EQUAL(nsa_compute_attention(ctx, query, keys, values, seq_len, output, NULL), NSA_OK);
}

static void test_the_window(void) {
    const uint64_t row = 64 * 4;
    const NSAConfig config = small();
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    /* Nothing in the buffer: the tail of the keys, token t in row t. */
    compute(&ctx, 50);
    CHECK_EQUAL(pointer(3, NSA_VALUE_k_win), at(keys));
    CHECK_EQUAL(pointer(3, NSA_VALUE_v_win), at(values));
    CHECK_EQUAL(number(3, NSA_VALUE_slots), 50);
    clear();
    CHECK_EQUAL(nsa_update_window(&ctx, keys, values, 50, NULL), NSA_OK);
    CHECK_EQUAL(number(0, NSA_VALUE_first_slot), 0);
    CHECK_EQUAL(fake->launches[0].grid[0], 50);
    const uint64_t ring = pointer(0, NSA_VALUE_k_win);
    compute(&ctx, 50);
    CHECK_EQUAL(pointer(3, NSA_VALUE_k_win), ring);
    CHECK_EQUAL(number(3, NSA_VALUE_slots), WINDOW);
    compute(&ctx, 51); /* one token is missing */
    CHECK_EQUAL(pointer(3, NSA_VALUE_k_win), at(keys));
    /* More than the window holds: its newest tokens. */
    clear();
    CHECK_EQUAL(nsa_update_window(&ctx, keys, values, 3 * WINDOW + 7, NULL), NSA_OK);
    CHECK_EQUAL(fake->launches[0].grid[0], WINDOW);
    CHECK_EQUAL(pointer(0, NSA_VALUE_new_k), at(keys) + (2 * WINDOW + 7) * row);
    CHECK_EQUAL(number(0, NSA_VALUE_first_slot), 57); /* of 50 + 2 * 96 + 7 */
    compute(&ctx, 50 + 3 * WINDOW + 7);
    CHECK_EQUAL(pointer(3, NSA_VALUE_k_win), ring);
    /* Token t of a sequence of 500 is 345 of the window's: 345 - 500 is 37 modulo 96. */
    compute(&ctx, 500);
    CHECK_EQUAL(pointer(3, NSA_VALUE_k_win), ring + 37 * row);
    CHECK_EQUAL(nsa_reset(&ctx), NSA_OK);
    compute(&ctx, 500);
    CHECK_EQUAL(pointer(3, NSA_VALUE_k_win), at(keys));
    nsa_free(&ctx);
}

static void test_incremental(void) {
    NSAConfig config = small();
    config.incremental = 1;
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    const struct {
        int seq_len, first, blocks;
    } steps[] = {{100, 0, 5}, {101, 5, 0}, {111, 5, 0}, {112, 5, 1}, {112, 6, 0}, {200, 6, 5}};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        compute(&ctx, steps[i].seq_len);
        CHECK_EQUAL(seen[0].kernel->role, NSA_ROLE_stream_begin);
        CHECK_EQUAL(number(0, NSA_VALUE_first), steps[i].first);
        CHECK_EQUAL(fake->launches[0].grid[0], 1 + steps[i].blocks);
    }
    CHECK_EQUAL(nsa_set_compression_weights(&ctx, NULL, NULL), NSA_OK); /* from the first block again */
    compute(&ctx, 200);
    CHECK_EQUAL(number(0, NSA_VALUE_first), 0);
    nsa_free(&ctx);
}

static void test_weights(void) {
    const NSAConfig config = small();
    const NSACompressionWeights linear = {weights, weights, NULL, 0}, mlp = {weights, weights, weights, 96};
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK_EQUAL(nsa_set_gate_weights(&ctx, weights), NSA_OK);
    CHECK_EQUAL(nsa_set_compression_weights(&ctx, &linear, &mlp), NSA_OK);
    compute(&ctx, SEQ_LEN);
    CHECK_EQUAL(number(0, NSA_VALUE_gated), 1);
    CHECK_EQUAL(fake->launches[0].grid[0], 1); /* no means */
    CHECK_EQUAL(pointer(0, NSA_VALUE_gate_weights), at(weights));
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(seen[1 + i].kernel->role, NSA_ROLE_stream_weighted);
        CHECK_EQUAL(nsa_constant(seen[1 + i].kernel, "MLP"), i);
        CHECK_EQUAL(pointer(1 + i, NSA_VALUE_x), at(i ? values : keys));
        CHECK_EQUAL(number(1 + i, NSA_VALUE_stop), 61);
        CHECK_EQUAL(fake->launches[1 + i].grid[0], 2);
    }
    CHECK_EQUAL(number(2, NSA_VALUE_hidden), 96);
    CHECK_EQUAL(pointer(1, NSA_VALUE_out), pointer(3, NSA_VALUE_k_cmp));
    CHECK_EQUAL(pointer(2, NSA_VALUE_out), pointer(3, NSA_VALUE_v_cmp));
    /* One of both: the means first, then what overwrites half of them. */
    CHECK_EQUAL(nsa_set_compression_weights(&ctx, NULL, &linear), NSA_OK);
    compute(&ctx, SEQ_LEN);
    CHECK_EQUAL(fake->launches[0].grid[0], 1 + 61);
    CHECK_EQUAL(seen[1].kernel->role, NSA_ROLE_stream_weighted);
    CHECK_EQUAL(pointer(1, NSA_VALUE_x), at(values));
    CHECK_EQUAL(seen[2].kernel->role, NSA_ROLE_decode_compressed);
    nsa_free(&ctx);
}

/* Chunks of blocks are chosen from again until one launch leaves one list. */
static void test_many_blocks(void) {
    NSAConfig config = small();
    config.max_seq_len = 1 << 20;
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    compute(&ctx, 1 << 20);
    CHECK_EQUAL(fake->launches[2].grid[0], 32);
    CHECK_EQUAL(seen[3].kernel->role, NSA_ROLE_decode_choose_again);
    CHECK_EQUAL(number(3, NSA_VALUE_count), 32 * 16);
    CHECK_EQUAL(pointer(3, NSA_VALUE_chosen_before), pointer(2, NSA_VALUE_chosen));
    CHECK_EQUAL(pointer(3, NSA_VALUE_chosen), pointer(4, NSA_VALUE_indices));
    CHECK_EQUAL(seen[4].kernel->role, NSA_ROLE_decode_tokens);
    nsa_free(&ctx);
}

/* 16 heads of a KV head for two programs. */
static void test_gates_of_many_heads(void) {
    const int kv_heads[] = {1, 2, 4}, programs[] = {3, 2, 1}; /* for groups of 48, 24 and 12 */
    for (int i = 0; i < 3; i++) {
        NSAConfig config = small();
        config.num_heads = 48;
        config.num_kv_heads = kv_heads[i];
        NSAContext ctx;
        CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
        compute(&ctx, 20);
        CHECK_EQUAL(fake->launches[0].grid[0], programs[i]);
        CHECK_EQUAL(fake->launches[0].grid[1], kv_heads[i]);
        nsa_free(&ctx);
    }
}

/* The rows of a head side by side, for all that write and read them. */
static void test_compressed_rows(void) {
    const NSACompressionWeights linear = {weights, weights, NULL, 0};
    NSAConfig config = small();
    config.num_kv_heads = 4;
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK_EQUAL(nsa_set_compression_weights(&ctx, &linear, &linear), NSA_OK);
    compute(&ctx, SEQ_LEN);
    const int row = 64, head = (2048 / 16 + 1) * 64;
    const NSAValueName rows[] = {NSA_VALUE_k_cmp_row, NSA_VALUE_v_cmp_row}, heads[] = {NSA_VALUE_k_cmp_head, NSA_VALUE_v_cmp_head};
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(number(0, rows[i]), row);
        CHECK_EQUAL(number(0, heads[i]), head);
        CHECK_EQUAL(seen[1 + i].kernel->role, NSA_ROLE_stream_weighted);
        CHECK_EQUAL(number(1 + i, NSA_VALUE_out_row), row);
        CHECK_EQUAL(number(1 + i, NSA_VALUE_out_head), head);
        CHECK_EQUAL(fake->launches[1 + i].grid[1], 4);
        CHECK_EQUAL(seen[3].kernel->role, NSA_ROLE_decode_compressed);
        CHECK_EQUAL(number(3, rows[i]), row);
        CHECK_EQUAL(number(3, heads[i]), head);
    }
    CHECK(pointer(3, NSA_VALUE_v_cmp) >= pointer(3, NSA_VALUE_k_cmp) + 4 * (uint64_t)head * 4);
    CHECK(pointer(0, NSA_VALUE_gates) >= pointer(3, NSA_VALUE_v_cmp) + 4 * (uint64_t)head * 4);
    nsa_free(&ctx);
}

/* 8 heads of 64 are 2^9 numbers a row: 2^22 rows have one more than 31 bits can count. */
static void test_more_rows_than_strides_reach(void) {
    for (int past = 0; past < 2; past++) {
        const int rows = (1 << 22) - 1 + past;
        NSAConfig config = small();
        config.num_kv_heads = 8;
        config.max_seq_len = 16 * (rows - 1) + 15;
        NSAPlan plan;
        char message[512];
        CHECK_EQUAL(nsa_make_plan(&config, 90, nsa_kernels, nsa_num_kernels, &plan, message), NSA_OK);
        CHECK_EQUAL(plan.values[NSA_VALUE_k_cmp_row].number, past ? 8 * 64 : 64);
        CHECK_EQUAL(plan.values[NSA_VALUE_v_cmp_row].number, past ? 8 * 64 : 64);
        CHECK_EQUAL(plan.values[NSA_VALUE_k_cmp_head].number, past ? 64 : rows * 64);
        CHECK_EQUAL(plan.values[NSA_VALUE_v_cmp_head].number, past ? 64 : rows * 64);
        CHECK_EQUAL(plan.offsets[NSA_VALUE_v_cmp] - plan.offsets[NSA_VALUE_k_cmp], (size_t)rows * 8 * 64 * 4);
    }
}

int main(void) {
    fake = open_fake();
    may_depend = fake_has("cuLaunchKernelEx");
    fake->on_launch = on_launch;
    test_a_step();
    test_the_window();
    test_incremental();
    test_weights();
    test_many_blocks();
    test_gates_of_many_heads();
    test_compressed_rows();
    test_more_rows_than_strides_reach();
    return failures != 0;
}
