/* A context takes its memory in nsa_init and gives it back, whatever fails in between. */
#include <stdalign.h>

#include "check.h"
#include "fake.h"
#include "nsa/nsa.h"

static alignas(64) char memory[64];
static Fake *fake;

static NSAConfig small(void) {
    NSAConfig config = nsa_create_default_config(64, 8);
    config.max_seq_len = 1000;
    return config;
}

static void check_nothing_left(void) {
    CHECK_EQUAL(fake->blocks, 0);
    CHECK_EQUAL(fake->modules, 0);
    CHECK_EQUAL(fake->retained, 0);
}

/* The calling thread's current context, as the driver has it. */
static void *current(void) {
    int (*get)(void **) = NULL;
    void *context = NULL, *found = fake_symbol("cuCtxGetCurrent");
    memcpy(&get, &found, sizeof get);
    get(&context);
    return context;
}

static void push(void *context) {
    int (*set)(void *) = NULL;
    void *found = fake_symbol("cuCtxPushCurrent_v2");
    memcpy(&set, &found, sizeof set);
    set(context);
}

static void pop(void) {
    int (*get)(void **) = NULL;
    void *context, *found = fake_symbol("cuCtxPopCurrent_v2");
    memcpy(&get, &found, sizeof get);
    get(&context);
}

static void *primary(int device) {
    void *(*get)(int) = NULL;
    void *found = fake_symbol("fake_primary");
    memcpy(&get, &found, sizeof get);
    return get(device);
}

static void test_memory(void) {
    const NSAConfig config = small();
    NSAContext ctx;
    size_t before = 0, after = 0;
    CHECK_EQUAL(nsa_workspace_size(NULL, &config, &before), NSA_OK);
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK(!*nsa_last_error(&ctx));
    CHECK_EQUAL(nsa_workspace_size(&ctx, NULL, &after), NSA_OK);
    CHECK_EQUAL(before, after);
    CHECK_EQUAL(fake->bytes, after);
    const int allocations = fake->allocations, modules = fake->modules;
    CHECK_EQUAL(fake->blocks, 1);
    for (int t = 1; t <= 1000; t += 37) {
        CHECK_EQUAL(nsa_update_window(&ctx, memory, memory, 1, NULL), NSA_OK);
        CHECK_EQUAL(nsa_compute_attention(&ctx, memory, memory, memory, t, memory, NULL), NSA_OK);
    }
    CHECK_EQUAL(fake->allocations, allocations);
    CHECK_EQUAL(fake->modules, modules);
    CHECK_EQUAL(fake->synchronized, 0);
    CHECK(!current());
    CHECK_EQUAL(nsa_free(&ctx), NSA_OK);
    CHECK_EQUAL(fake->synchronized, 1);
    check_nothing_left();
}

static void test_every_failure(void) {
    const char *functions[] = {"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
                               "cuCtxPushCurrent_v2", "cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc_v2"};
    const NSAConfig config = small();
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        for (int after = 0;; after++) {
            NSAContext ctx;
            fake->failing = functions[i], fake->failing_after = after, fake->failing_with = 999;
            const int error = nsa_init(&ctx, &config);
            const int reached = !fake->failing;
            fake->failing = NULL;
            if (!reached) {
                CHECK(after > 0);
                CHECK_EQUAL(error, NSA_OK);
                nsa_free(&ctx);
                break;
            }
            CHECK_EQUAL(error, i == 0 || (i == 1 && after == 0) ? NSA_ERROR_NO_DEVICE : NSA_ERROR_CUDA);
            CHECK(*nsa_last_error(&ctx));
            check_nothing_left();
            CHECK(!current());
        }
}

static void test_failing_launches(void) {
    NSAConfig config = small();
    config.incremental = 1;
    NSAContext ctx;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    int after = 0;
    for (int done = 0; !done; after++) {
        fake->failing = "cuLaunchKernelEx", fake->failing_after = after, fake->failing_with = 719;
        const int error = nsa_compute_attention(&ctx, memory, memory, memory, 900, memory, NULL);
        done = fake->failing != NULL;
        fake->failing = NULL;
        CHECK_EQUAL(error, done ? NSA_OK : NSA_ERROR_CUDA);
        CHECK(!current());
        if (done)
            break;
        CHECK_TEXT(nsa_last_error(&ctx), "_kernel failed: a fake error (CUDA error 719)");
        /* What failed counts for nothing: fewer tokens are still allowed. */
        CHECK_EQUAL(nsa_compute_attention(&ctx, memory, memory, memory, 40, memory, NULL), NSA_OK);
        CHECK_EQUAL(nsa_reset(&ctx), NSA_OK);
    }
    CHECK(after >= 5);
    nsa_free(&ctx);
    check_nothing_left();
}

static void test_out_of_memory(void) {
    NSAContext ctx;
    NSAConfig config = small();
    const size_t memory_before = fake->memory;
    fake->memory = 1000;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_OUT_OF_MEMORY);
    CHECK_TEXT(nsa_last_error(&ctx), "bytes for max_seq_len=1000 does not fit");
    fake->memory = memory_before;
    fake->failing = "cuModuleLoadData", fake->failing_after = 3, fake->failing_with = 2;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_OUT_OF_MEMORY);
    CHECK_TEXT(nsa_last_error(&ctx), "out of memory (CUDA error 2)");
    check_nothing_left();
}

static void test_not_exported(void) {
    NSAContext ctx;
    size_t bytes;
    NSAConfig config = small();
    config.head_dim = 72;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_NOT_EXPORTED);
    CHECK_TEXT(nsa_last_error(&ctx), "no kernels for compute capability 90, head dims 72/64, fp32; this library has");
    CHECK_TEXT(nsa_last_error(&ctx), "cmake -DNSA_ARCHS=90 -DNSA_DIMS=72/64 -DNSA_DTYPES=fp32");
    CHECK_EQUAL(nsa_workspace_size(NULL, &config, &bytes), NSA_ERROR_NOT_EXPORTED);
    config = small();
    config.num_selected_blocks = 4096;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_NOT_EXPORTED);
    CHECK_TEXT(nsa_last_error(&ctx), "no kernel was exported for so many num_selected_blocks");
    config = small();
    fake->arch = 75;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_NOT_EXPORTED);
    CHECK_TEXT(nsa_last_error(&ctx), "no kernels for compute capability 75");
    fake->arch = 90;
    check_nothing_left();
}

static void test_devices(void) {
    NSAContext ctx;
    NSAConfig config = small();
    fake->devices = 0;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_NO_DEVICE);
    CHECK_TEXT(nsa_last_error(&ctx), "no NVIDIA GPU on this machine: no CUDA-capable device is detected");
    fake->devices = 2;
    config.device = 2;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_TEXT(nsa_last_error(&ctx), "device must be less than the 2 devices that there are, got 2");
    /* The device that is asked for, by its primary context. */
    config.device = 1;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK_EQUAL(fake->retained, 1);
    CHECK_EQUAL(nsa_update_window(&ctx, memory, memory, 1, NULL), NSA_OK);
    CHECK(fake->launches[fake->num_launches - 1].context == primary(1));
    nsa_free(&ctx);
    /* The thread's own context, where it has one on the device. */
    int own;
    push(&own);
    config.device = -1;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK_EQUAL(fake->retained, 0);
    pop();
    CHECK_EQUAL(nsa_update_window(&ctx, memory, memory, 1, NULL), NSA_OK);
    CHECK(fake->launches[fake->num_launches - 1].context == (void *)&own);
    CHECK(!current());
    nsa_free(&ctx);
    /* Not where it is on another device. */
    push(&own); /* on device 0, as the fake has it */
    config.device = 1;
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_OK);
    CHECK_EQUAL(fake->retained, 1);
    CHECK(current() == (void *)&own);
    nsa_free(&ctx);
    pop();
    fake->devices = 1;
    check_nothing_left();
}

int main(void) {
    fake = open_fake();
    test_memory();
    test_every_failure();
    test_failing_launches();
    test_out_of_memory();
    test_not_exported();
    test_devices();
    return failures != 0;
}
