/* The circular buffer of the window branch. */
#include "config.h"
#include "error.h"
#include "state.h"

int nsa_update_window(NSAContext *ctx, const void *new_keys, const void *new_values, int num_new, nsa_stream_t stream) {
    NSAState *state = nsa_alive(ctx);
    if (!state)
        return NSA_ERROR_INVALID_ARGUMENT;
    if (num_new < 0)
        return nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "num_new must not be negative, got %d", num_new);
    if (num_new == 0)
        return NSA_OK;
    int error = nsa_check_pointer(ctx, "new_keys", new_keys);
    error = error ? error : nsa_check_pointer(ctx, "new_values", new_values);
    if (error)
        return error;
    NSAValue *values = state->plan.values;
    const int slots = values[NSA_VALUE_slots].number, kept = num_new < slots ? num_new : slots;
    const uint64_t skipped = (uint64_t)(num_new - kept), element = (uint64_t)nsa_dtype_size(state->config.dtype);
    const unsigned grid[3] = {(unsigned)kept, 1, 1};
    values[NSA_VALUE_new_k].pointer = (uintptr_t)new_keys + skipped * element * (uint64_t)values[NSA_VALUE_width].number;
    values[NSA_VALUE_new_v].pointer = (uintptr_t)new_values + skipped * element * (uint64_t)values[NSA_VALUE_value_width].number;
    values[NSA_VALUE_first_slot].number = (int)((state->window_seen + skipped) % (uint64_t)slots);
    error = nsa_enter(state, ctx->error);
    if (error)
        return error;
    error = nsa_launch(&state->driver, &state->loaded[NSA_SLOT_WINDOW], values, grid, stream, ctx->error);
    nsa_leave(state);
    if (!error)
        state->window_seen += (uint64_t)num_new;
    return error;
}
