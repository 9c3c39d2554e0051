/* Making and freeing a context, and all that changes it without a launch. */
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "error.h"
#include "state.h"

#define ALIVE UINT64_C(0x4e53412d616c6976) /* so that a struct that nobody initialised is told from one in use */

NSAState *nsa_alive(NSAContext *ctx) {
    if (!ctx)
        return NULL;
    if (ctx->check == ALIVE && ctx->state)
        return ctx->state;
    nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "ctx was freed, or nsa_init did not succeed");
    return NULL;
}

int nsa_check_pointer(NSAContext *ctx, const char *name, const void *pointer) {
    if (!pointer)
        return nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "%s must not be NULL", name);
    if ((uintptr_t)pointer % 16)
        return nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "%s must be aligned to 16 bytes, got %p", name, pointer);
    return NSA_OK;
}

int nsa_enter(NSAState *state, char *message) {
    return nsa_driver_check(&state->driver, state->driver.context_push(state->context), "cuCtxPushCurrent", message);
}

void nsa_leave(NSAState *state) {
    CUcontext popped;
    state->driver.context_pop(&popped);
}

/* The context that the thread has on the device, or the device's primary one. */
static int take_device(NSAState *state, char *message) {
    const NSADriver *driver = &state->driver;
    const int asked = state->config.device;
    int count = 0;
    int error = nsa_driver_check(driver, driver->device_count(&count), "cuDeviceGetCount", message);
    if (error)
        return error;
    if (asked >= count)
        return nsa_fail(message, NSA_ERROR_INVALID_ARGUMENT, "device must be less than the %d devices that there are, got %d", count,
                        asked);
    error = nsa_driver_check(driver, driver->device_get(&state->device, asked < 0 ? 0 : asked), "cuDeviceGet", message);
    if (error)
        return error;
    CUcontext current = NULL;
    CUdevice its_device = 0;
    if (driver->context_current(&current) == CUDA_SUCCESS && current && driver->context_device(&its_device) == CUDA_SUCCESS &&
        (asked < 0 || its_device == state->device)) {
        state->context = current;
        state->device = its_device;
        return NSA_OK;
    }
    error = nsa_driver_check(driver, driver->primary_retain(&state->context, state->device), "cuDevicePrimaryCtxRetain", message);
    state->retained = !error;
    return error;
}

static int device_arch(const NSAState *state, int *arch, char *message) {
    const NSADriver *driver = &state->driver;
    int major = 0, minor = 0;
    CUresult result = driver->device_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, state->device);
    if (result == CUDA_SUCCESS)
        result = driver->device_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, state->device);
    *arch = 10 * major + minor;
    return nsa_driver_check(driver, result, "cuDeviceGetAttribute", message);
}

/* Kernels and workspace, in the current CUDA context. */
static int fill(NSAState *state, char *message) {
    const NSADriver *driver = &state->driver;
    NSAPlan *plan = &state->plan;
    for (int i = 0; i < NSA_NUM_SLOTS; i++) {
        const int error = plan->kernels[i] ? nsa_load(driver, plan->kernels[i], &state->loaded[i], message) : NSA_OK;
        if (error)
            return error;
    }
    const CUresult result = driver->memory_allocate(&state->workspace, plan->bytes);
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        return nsa_fail(message, NSA_ERROR_OUT_OF_MEMORY, "the workspace of %zu bytes for max_seq_len=%d does not fit", plan->bytes,
                        state->config.max_seq_len);
    for (int name = 0; name < NSA_NUM_VALUES; name++)
        if (plan->offsets[name] || name == NSA_VALUE_k_cmp) /* the one at offset 0 */
            plan->values[name].pointer = state->workspace + plan->offsets[name];
    /* One page holds all, so nobody reads a table; a pointer that can be read keeps the kernels free of a special case. */
    plan->values[NSA_VALUE_table].pointer = plan->values[NSA_VALUE_lengths].pointer;
    return nsa_driver_check(driver, result, "cuMemAlloc", message);
}

/* Undo as much as was done. */
static void release(NSAState *state) {
    const NSADriver *driver = &state->driver;
    if (state->context && driver->context_push(state->context) == CUDA_SUCCESS) {
        if (state->workspace) {
            driver->context_synchronize(); /* kernels may still use what is freed below */
            driver->memory_free(state->workspace);
        }
        for (int i = 0; i < NSA_NUM_SLOTS; i++)
            if (state->loaded[i].module)
                driver->module_unload(state->loaded[i].module);
        nsa_leave(state);
    }
    if (state->retained)
        driver->primary_release(state->device);
    nsa_driver_close(&state->driver);
    free(state);
}

static int start(NSAState *state, char *message) {
    int arch, error = nsa_driver_open(&state->driver, message);
    error = error ? error : take_device(state, message);
    error = error ? error : device_arch(state, &arch, message);
    error = error ? error : nsa_make_plan(&state->config, arch, nsa_kernels, nsa_num_kernels, &state->plan, message);
    error = error ? error : nsa_enter(state, message);
    if (error)
        return error;
    error = fill(state, message);
    nsa_leave(state);
    return error;
}

int nsa_init(NSAContext *ctx, const NSAConfig *config) {
    if (!ctx)
        return NSA_ERROR_INVALID_ARGUMENT;
    memset(ctx, 0, sizeof *ctx);
    int error = nsa_check_config(config, ctx->error);
    if (error)
        return error;
    NSAState *state = calloc(1, sizeof *state);
    if (!state)
        return nsa_fail(ctx->error, NSA_ERROR_OUT_OF_MEMORY, "%zu bytes of host memory for a context are not there", sizeof *state);
    state->config = *config;
    error = start(state, ctx->error);
    if (error) {
        release(state);
        return error;
    }
    ctx->state = state;
    ctx->check = ALIVE;
    return NSA_OK;
}

int nsa_free(NSAContext *ctx) {
    if (!ctx)
        return NSA_ERROR_INVALID_ARGUMENT;
    if (ctx->check == ALIVE && ctx->state)
        release(ctx->state);
    memset(ctx, 0, sizeof *ctx);
    return NSA_OK;
}

int nsa_reset(NSAContext *ctx) {
    NSAState *state = nsa_alive(ctx);
    if (!state)
        return NSA_ERROR_INVALID_ARGUMENT;
    state->window_seen = 0;
    state->compressed_len = 0;
    return NSA_OK;
}

int nsa_set_gate_weights(NSAContext *ctx, const void *weights) {
    NSAState *state = nsa_alive(ctx);
    const int error = !state ? NSA_ERROR_INVALID_ARGUMENT : weights ? nsa_check_pointer(ctx, "weights", weights) : NSA_OK;
    if (!error)
        state->gate_weights = weights;
    return error;
}

static int check_weights(NSAContext *ctx, const char *whose, const NSACompressionWeights *weights) {
    const struct {
        const char *name;
        const void *pointer;
    } needed[] = {{"embedding", weights->embedding}, {"w1", weights->w1}, {"w2", weights->w2}};
    for (int i = 0; i < (weights->w2 ? 3 : 2); i++) {
        char name[32] = "";
        strcat(strcat(strcpy(name, whose), "->"), needed[i].name);
        const int error = nsa_check_pointer(ctx, name, needed[i].pointer);
        if (error)
            return error;
    }
    if (weights->w2 ? weights->hidden < 1 : weights->hidden != 0)
        return nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "%s->hidden must be %s, got %d", whose,
                        weights->w2 ? "positive with w2" : "0 without w2", weights->hidden);
    return NSA_OK;
}

int nsa_set_compression_weights(NSAContext *ctx, const NSACompressionWeights *keys, const NSACompressionWeights *values) {
    static const NSACompressionWeights mean = {0};
    NSAState *state = nsa_alive(ctx);
    int error = state ? NSA_OK : NSA_ERROR_INVALID_ARGUMENT;
    error = error || !keys ? error : check_weights(ctx, "keys", keys);
    error = error || !values ? error : check_weights(ctx, "values", values);
    if (error)
        return error;
    state->compression[0] = keys ? *keys : mean;
    state->compression[1] = values ? *values : mean;
    state->compressed_len = 0;
    return NSA_OK;
}

int nsa_workspace_size(NSAContext *ctx, const NSAConfig *config, size_t *bytes) {
    char *message = ctx ? ctx->error : NULL;
    NSAPlan plan;
    if (!bytes)
        return nsa_fail(message, NSA_ERROR_INVALID_ARGUMENT, "bytes must not be NULL");
    *bytes = 0;
    if (!config) {
        const NSAState *state = nsa_alive(ctx);
        *bytes = state ? state->plan.bytes : 0;
        return state ? NSA_OK : NSA_ERROR_INVALID_ARGUMENT;
    }
    int error = nsa_check_config(config, message);
    error = error ? error : nsa_make_plan(config, 0, nsa_kernels, nsa_num_kernels, &plan, message);
    if (!error)
        *bytes = plan.bytes;
    return error;
}

const char *nsa_last_error(const NSAContext *ctx) { return ctx ? ctx->error : "ctx must not be NULL"; }
