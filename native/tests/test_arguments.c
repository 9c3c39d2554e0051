/* NULL and nonsense, to every entry point. */
#include <stdalign.h>

#include "check.h"
#include "fake.h"
#include "nsa/nsa.h"

static alignas(64) char memory[64];

/* Every call but nsa_init and nsa_free, with arguments that are right but for the context. */
static void check_refused(NSAContext *ctx) {
    size_t bytes;
    CHECK_EQUAL(nsa_compute_attention(ctx, memory, memory, memory, 1, memory, NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_update_window(ctx, memory, memory, 1, NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_reset(ctx), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_set_gate_weights(ctx, NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_set_compression_weights(ctx, NULL, NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_workspace_size(ctx, NULL, &bytes), NSA_ERROR_INVALID_ARGUMENT);
}

static void test_null_context(void) {
    const NSAConfig config = nsa_create_default_config(64, 8);
    size_t bytes;
    CHECK_EQUAL(nsa_init(NULL, &config), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_init(NULL, NULL), NSA_ERROR_INVALID_ARGUMENT);
    check_refused(NULL);
    CHECK_EQUAL(nsa_workspace_size(NULL, &config, NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_EQUAL(nsa_workspace_size(NULL, &config, &bytes), NSA_OK);
    CHECK_EQUAL(nsa_free(NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_TEXT(nsa_last_error(NULL), "ctx must not be NULL");
}

static void check_dead(NSAContext *ctx) {
    check_refused(ctx);
    CHECK_TEXT(nsa_last_error(ctx), "ctx was freed, or nsa_init did not succeed");
    CHECK_EQUAL(nsa_free(ctx), NSA_OK);
}

static void test_dead_contexts(void) {
    const NSAConfig config = nsa_create_default_config(64, 8);
    NSAContext ctx;
    memset(&ctx, 0, sizeof ctx);
    check_dead(&ctx);
    memset(&ctx, 0xa5, sizeof ctx); /* nobody initialised it */
    check_dead(&ctx);
    CHECK_EQUAL(nsa_init(&ctx, NULL), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_TEXT(nsa_last_error(&ctx), "config must not be NULL");
    check_dead(&ctx);
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK_EQUAL(nsa_free(&ctx), NSA_OK);
    check_dead(&ctx);
}

#define REFUSE(call, why)                                                                                                      \
    do {                                                                                                                       \
        CHECK_EQUAL(call, NSA_ERROR_INVALID_ARGUMENT);                                                                         \
        CHECK_TEXT(nsa_last_error(&ctx), why);                                                                                 \
    } while (0)

static void test_bad_arguments(void) {
    const Fake *fake = open_fake();
    NSAConfig config = nsa_create_default_config(64, 8);
    config.max_seq_len = 100;
    config.incremental = 1;
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    const int launches = fake->num_launches;
    REFUSE(nsa_compute_attention(&ctx, NULL, memory, memory, 1, memory, NULL), "query must not be NULL");
    REFUSE(nsa_compute_attention(&ctx, memory, NULL, memory, 1, memory, NULL), "keys must not be NULL");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, NULL, 1, memory, NULL), "values must not be NULL");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory, 1, NULL, NULL), "output must not be NULL");
    REFUSE(nsa_compute_attention(&ctx, memory + 8, memory, memory, 1, memory, NULL), "query must be aligned to 16 bytes, got 0x");
    REFUSE(nsa_compute_attention(&ctx, memory, memory + 4, memory, 1, memory, NULL), "keys must be aligned to 16 bytes, got 0x");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory + 2, 1, memory, NULL), "values must be aligned to 16");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory, 1, memory + 1, NULL), "output must be aligned to 16");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory, 0, memory, NULL), "seq_len must be from 1 to max_seq_len=100, got 0");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory, -5, memory, NULL), "got -5");
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory, 101, memory, NULL), "max_seq_len=100, got 101");
    REFUSE(nsa_update_window(&ctx, memory, memory, -1, NULL), "num_new must not be negative, got -1");
    REFUSE(nsa_update_window(&ctx, NULL, memory, 1, NULL), "new_keys must not be NULL");
    REFUSE(nsa_update_window(&ctx, memory, NULL, 1, NULL), "new_values must not be NULL");
    REFUSE(nsa_update_window(&ctx, memory + 8, memory, 1, NULL), "new_keys must be aligned to 16 bytes");
    REFUSE(nsa_set_gate_weights(&ctx, memory + 8), "weights must be aligned to 16 bytes");
    const NSACompressionWeights none = {memory, NULL, NULL, 0}, bare = {NULL, memory, NULL, 0}, odd = {memory, memory, NULL, 64},
                                empty = {memory, memory, memory, 0}, skew = {memory, memory, memory + 4, 64};
    REFUSE(nsa_set_compression_weights(&ctx, &none, NULL), "keys->w1 must not be NULL");
    REFUSE(nsa_set_compression_weights(&ctx, NULL, &bare), "values->embedding must not be NULL");
    REFUSE(nsa_set_compression_weights(&ctx, &odd, NULL), "keys->hidden must be 0 without w2, got 64");
    REFUSE(nsa_set_compression_weights(&ctx, &empty, NULL), "keys->hidden must be positive with w2, got 0");
    REFUSE(nsa_set_compression_weights(&ctx, NULL, &skew), "values->w2 must be aligned to 16 bytes");
    REFUSE(nsa_workspace_size(&ctx, NULL, NULL), "bytes must not be NULL");
    CHECK_EQUAL(fake->num_launches, launches);
    /* None of it spoils the context. */
    CHECK_EQUAL(nsa_update_window(&ctx, NULL, NULL, 0, NULL), NSA_OK);
    CHECK_EQUAL(nsa_compute_attention(&ctx, memory, memory, memory, 100, memory, NULL), NSA_OK);
    REFUSE(nsa_compute_attention(&ctx, memory, memory, memory, 99, memory, NULL),
           "seq_len must not shrink, got 99 after 100; call nsa_reset first");
    CHECK_EQUAL(nsa_reset(&ctx), NSA_OK);
    CHECK_EQUAL(nsa_compute_attention(&ctx, memory, memory, memory, 99, memory, NULL), NSA_OK);
    CHECK_EQUAL(nsa_free(&ctx), NSA_OK);
}

int main(void) {
    test_null_context();
    test_dead_contexts();
    test_bad_arguments();
    return failures != 0;
}
