/* A decode step: length, gates and compression, the three branches, their sum.
 *
 * From compute capability 9.0 on a kernel may start while the one before it still runs, and the kernels themselves wait. These
 * are the kernels of nsa_update_window and of a step, and what each does first:
 *
 *     window, begin, weighted   let the next start, and wait
 *     compressed, choose        wait, and let the next start
 *     choose_again              lets the next start, and waits
 *     tokens                    lets the next start; programs of selected blocks wait, those of the window do not
 *     merge                     waits, and lets the next start by ending
 *
 * Waiting is until the launch before has ended and its writes can be read. That launch had waited for the one before it, so when a
 * wait returns, all launches before have ended: every read comes after the writes that it needs, and every write after the reads
 * of what it replaces, those of steps before and of the caller's kernels among them. That holds for the first kernel of a call
 * too, whatever ran before it on the stream, as long as what ran there waited likewise; and a launch that follows a call, early or
 * not, is behind its last kernel, which waited. Tokens ends when all its programs have, so those that do not wait break no chain.
 *
 * These, the window's programs of tokens, start once every program of the launch before has let them. Behind choose that is after
 * all of its programs have waited for compressed; behind choose_again, which started after that, it is later still. So begin,
 * window, and all that was launched before compressed have ended, which is all that these programs read: the query, the length,
 * the window's buffer or the caller's keys. They write parts of part_o and part_lse of their own, which the merge of the step
 * before has read, and which choose, that may run beside them, does not: it reads the parts of compressed. What they must not do
 * is read the selection, or write anything that compressed, choose or choose_again touches. */
#include <string.h>

#include "config.h"
#include "error.h"
#include "state.h"

/* One call: a copy of the plan's values with its own, and where to launch. */
typedef struct Step {
    NSAState *state;
    NSAValue values[NSA_NUM_VALUES];
    nsa_stream_t stream;
    char *message;
} Step;

static int launch(Step *step, int slot, const unsigned grid[3]) {
    NSAState *state = step->state;
    return nsa_launch(&state->driver, &state->loaded[slot], step->values, grid ? grid : state->plan.grids[slot], step->stream,
                      step->message);
}

/* Blocks of keys (which = 0) or values (1) by the weights that were set for them. */
static int compress_weighted(Step *step, int which) {
    const NSACompressionWeights *weights = &step->state->compression[which];
    NSAValue *values = step->values;
    const int slot = (weights->w2 ? NSA_SLOT_MLP_KEYS : NSA_SLOT_LINEAR_KEYS) + which;
    const int blocks = values[NSA_VALUE_stop].number - values[NSA_VALUE_first].number;
    const int together = nsa_constant(step->state->plan.kernels[slot], "BM");
    const unsigned grid[3] = {(unsigned)((blocks - 1) / together + 1), (unsigned)step->state->config.num_kv_heads, 1};
    values[NSA_VALUE_x] = values[which ? NSA_VALUE_v : NSA_VALUE_k];
    values[NSA_VALUE_out] = values[which ? NSA_VALUE_v_cmp : NSA_VALUE_k_cmp];
    values[NSA_VALUE_out_row] = values[which ? NSA_VALUE_v_cmp_row : NSA_VALUE_k_cmp_row];
    values[NSA_VALUE_out_head] = values[which ? NSA_VALUE_v_cmp_head : NSA_VALUE_k_cmp_head];
    values[NSA_VALUE_embedding].pointer = (uintptr_t)weights->embedding;
    values[NSA_VALUE_w1].pointer = (uintptr_t)weights->w1;
    values[NSA_VALUE_w2].pointer = (uintptr_t)(weights->w2 ? weights->w2 : weights->w1); /* linear reads none */
    values[NSA_VALUE_hidden].number = weights->hidden;
    return launch(step, slot, grid);
}

/* The length and the gates, and the blocks that end within seq_len and that an incremental context has not yet. */
static int begin(Step *step, int seq_len) {
    const NSAState *state = step->state;
    NSAValue *values = step->values;
    const int start = state->config.incremental ? nsa_num_compressed_blocks(&state->config, state->compressed_len) : 0;
    const int stop = nsa_num_compressed_blocks(&state->config, seq_len);
    /* The means of keys and values are one launch; where only one of them is wanted, the other's are overwritten. */
    const int means = state->compression[0].w1 && state->compression[1].w1 ? 0 : stop - start;
    const int heads = 2 * nsa_constant(state->plan.kernels[NSA_SLOT_BEGIN], "BH"); /* of the gates of two programs */
    const int gates = (values[NSA_VALUE_group].number - 1) / heads + 1;
    const unsigned grid[3] = {(unsigned)(gates + means), (unsigned)state->config.num_kv_heads, 2};
    values[NSA_VALUE_first].number = start;
    values[NSA_VALUE_stop].number = stop;
    int error = launch(step, NSA_SLOT_BEGIN, grid);
    for (int which = 0; which < 2 && stop > start && !error; which++)
        if (state->compression[which].w1)
            error = compress_weighted(step, which);
    return error;
}

/* The blocks that the query reads into indices: chosen chunk by chunk, then among those. */
static int choose(Step *step) {
    const NSAPlan *plan = &step->state->plan;
    NSAValue *values = step->values;
    const NSAValue buffers[2] = {values[NSA_VALUE_chosen], {step->state->workspace + plan->other_chosen}};
    values[NSA_VALUE_chosen] = plan->again ? buffers[0] : values[NSA_VALUE_indices];
    int error = launch(step, NSA_SLOT_CHOOSE, NULL);
    for (int i = 0; i < plan->again && !error; i++) {
        values[NSA_VALUE_chosen_before] = values[NSA_VALUE_chosen];
        values[NSA_VALUE_chosen] = i + 1 == plan->again ? values[NSA_VALUE_indices] : buffers[(i + 1) % 2];
        values[NSA_VALUE_count].number = plan->counts[i];
        error = launch(step, NSA_SLOT_AGAIN + i, NULL);
    }
    return error;
}

/* Where the window's branch reads: the circular buffer, or the tail of the keys.
 *
 * The kernel takes token t of the sequence from slot t % slots. The buffer has it elsewhere if the window did not begin with the
 * sequence: by as many slots as more or fewer tokens were seen, which the buffer's second copy lets the pointers make up for. */
static void place_window(Step *step, int seq_len) {
    const NSAState *state = step->state;
    NSAValue *values = step->values;
    const uint64_t slots = (uint64_t)values[NSA_VALUE_slots].number, tokens = (uint64_t)seq_len;
    const uint64_t element = (uint64_t)nsa_dtype_size(state->config.dtype);
    if (state->window_seen < (tokens < slots ? tokens : slots)) {
        values[NSA_VALUE_k_win] = values[NSA_VALUE_k];
        values[NSA_VALUE_v_win] = values[NSA_VALUE_v];
        values[NSA_VALUE_slots].number = seq_len;
        return;
    }
    const uint64_t ahead = (state->window_seen % slots + slots - tokens % slots) % slots;
    values[NSA_VALUE_k_win].pointer += ahead * element * (uint64_t)values[NSA_VALUE_width].number;
    values[NSA_VALUE_v_win].pointer += ahead * element * (uint64_t)values[NSA_VALUE_value_width].number;
}

static int run(Step *step, int seq_len, void *output) {
    int error = begin(step, seq_len);
    error = error ? error : launch(step, NSA_SLOT_COMPRESSED, NULL);
    error = error ? error : choose(step);
    place_window(step, seq_len);
    error = error ? error : launch(step, NSA_SLOT_TOKENS, NULL);
    step->values[NSA_VALUE_out].pointer = (uintptr_t)output;
    return error ? error : launch(step, NSA_SLOT_MERGE, NULL);
}

int nsa_compute_attention(NSAContext *ctx, const void *query, const void *keys, const void *values, int seq_len, void *output,
                          nsa_stream_t stream) {
    NSAState *state = nsa_alive(ctx);
    if (!state)
        return NSA_ERROR_INVALID_ARGUMENT;
    const NSAConfig *config = &state->config;
    int error = nsa_check_pointer(ctx, "query", query);
    error = error ? error : nsa_check_pointer(ctx, "keys", keys);
    error = error ? error : nsa_check_pointer(ctx, "values", values);
    error = error ? error : nsa_check_pointer(ctx, "output", output);
    if (error)
        return error;
    if (seq_len < 1 || seq_len > config->max_seq_len)
        return nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "seq_len must be from 1 to max_seq_len=%d, got %d",
                        config->max_seq_len, seq_len);
    if (config->incremental && seq_len < state->compressed_len)
        return nsa_fail(ctx->error, NSA_ERROR_INVALID_ARGUMENT, "seq_len must not shrink, got %d after %d; call nsa_reset first",
                        seq_len, state->compressed_len);
    Step step = {.state = state, .stream = stream, .message = ctx->error};
    memcpy(step.values, state->plan.values, sizeof step.values);
    step.values[NSA_VALUE_q].pointer = (uintptr_t)query;
    step.values[NSA_VALUE_k].pointer = (uintptr_t)keys;
    step.values[NSA_VALUE_v].pointer = (uintptr_t)values;
    step.values[NSA_VALUE_seq_len].number = seq_len;
    step.values[NSA_VALUE_gated].number = state->gate_weights != NULL;
    step.values[NSA_VALUE_gate_weights].pointer = (uintptr_t)(state->gate_weights ? state->gate_weights : query);
    error = nsa_enter(state, ctx->error);
    if (error)
        return error;
    error = run(&step, seq_len, output);
    nsa_leave(state);
    if (!error && config->incremental)
        state->compressed_len = seq_len;
    return error;
}
