#include "plan.h"

#include <string.h>

#include "config.h"
#include "error.h"

#define ALIGNMENT 256 /* of the workspace's tensors; kernels need 16 */
#define LOG2E 1.4426950408889634

typedef struct Planner {
    const NSAConfig *config;
    const NSAKernel *table;
    int num_kernels, arch;
    NSAPlan *plan;
    char *message;
} Planner;

static int at_most(int a, int b) { return a < b ? a : b; }
static int at_least(int a, int b) { return a > b ? a : b; }
static int divided_up(int a, int b) { return (a - 1) / b + 1; } /* a >= 1; a + b might pass 31 bits */

static void set(Planner *p, NSAValueName name, int number) { p->plan->values[name].number = number; }
static int get(const Planner *p, NSAValueName name) { return p->plan->values[name].number; }

static int pick(Planner *p, NSASlot slot, NSARole role, const char *wanted) {
    const NSAConfig *c = p->config;
    const NSAKernel *found = nsa_pick(p->table, p->num_kernels, role, p->arch, c->dtype, p->plan->values);
    p->plan->kernels[slot] = found;
    if (found)
        return NSA_OK;
    if (wanted)
        return nsa_fail(p->message, NSA_ERROR_NOT_EXPORTED, "no kernel was exported for %s", wanted);
    return nsa_fail(p->message, NSA_ERROR_NOT_EXPORTED,
                    "no kernels for compute capability %d, head dims %d/%d, %s; this library has %s. Build it with cmake "
                    "-DNSA_ARCHS=%d -DNSA_DIMS=%d/%d -DNSA_DTYPES=%s",
                    p->arch, c->head_dim, c->value_dim, nsa_dtype_name(c->dtype), nsa_exported, p->arch, c->head_dim,
                    c->value_dim, nsa_dtype_name(c->dtype));
}

static void set_grid(Planner *p, NSASlot slot, int x, int y, int z) {
    unsigned *grid = p->plan->grids[slot];
    grid[0] = (unsigned)x, grid[1] = (unsigned)y, grid[2] = (unsigned)z;
}

/* Each block in the row of the stride in which it ends. */
static int compressed_rows(const NSAConfig *c) { return c->max_seq_len / c->block_stride + 1; }

/* The rows of a KV head lie side by side, since its programs read them all and no other's. Strides are 32 bits, and a kernel that
 * multiplies a head by one does so in 32 bits: where that is too little, the heads of a row lie side by side. */
static void set_compressed_strides(Planner *p) {
    const NSAConfig *c = p->config;
    const int64_t rows = compressed_rows(c), longest = rows * at_least(c->head_dim, c->value_dim);
    const int apart = longest * c->num_kv_heads <= INT32_MAX;
    set(p, NSA_VALUE_k_cmp_row, apart ? c->head_dim : get(p, NSA_VALUE_width));
    set(p, NSA_VALUE_k_cmp_head, apart ? (int)rows * c->head_dim : c->head_dim);
    set(p, NSA_VALUE_v_cmp_row, apart ? c->value_dim : get(p, NSA_VALUE_value_width));
    set(p, NSA_VALUE_v_cmp_head, apart ? (int)rows * c->value_dim : c->value_dim);
}

static void set_numbers(Planner *p) {
    const NSAConfig *c = p->config;
    set(p, NSA_VALUE_head_dim, c->head_dim);
    set(p, NSA_VALUE_value_dim, c->value_dim);
    set(p, NSA_VALUE_heads, c->num_heads);
    set(p, NSA_VALUE_kv_heads, c->num_kv_heads);
    set(p, NSA_VALUE_group, c->num_heads / c->num_kv_heads);
    set(p, NSA_VALUE_queries, 1);
    set(p, NSA_VALUE_max_pages, 1);
    set(p, NSA_VALUE_length, c->block_length);
    set(p, NSA_VALUE_stride, c->block_stride);
    set(p, NSA_VALUE_size, c->selection_block_size);
    set(p, NSA_VALUE_per_block, c->selection_block_size / c->block_stride);
    set(p, NSA_VALUE_selection, divided_up(c->max_seq_len, c->selection_block_size));
    set(p, NSA_VALUE_n, c->num_selected_blocks);
    set(p, NSA_VALUE_num_initial, c->num_initial_blocks);
    set(p, NSA_VALUE_num_local, c->num_local_blocks);
    set(p, NSA_VALUE_window, c->window_size);
    set(p, NSA_VALUE_slots, at_most(c->window_size, c->max_seq_len));
    set(p, NSA_VALUE_page_stride, 0);
    set(p, NSA_VALUE_width, c->num_kv_heads * c->head_dim);
    set(p, NSA_VALUE_value_width, c->num_kv_heads * c->value_dim);
    set_compressed_strides(p);
    p->plan->values[NSA_VALUE_scale].real = (float)(c->softmax_scale * LOG2E);
}

/* The kernels of a stream: compressors of keys and values, linear and MLP, are picked by a dim of their own. */
static int plan_stream(Planner *p) {
    const NSAConfig *c = p->config;
    int error = pick(p, NSA_SLOT_BEGIN, NSA_ROLE_stream_begin, NULL);
    error = error ? error : pick(p, NSA_SLOT_WINDOW, NSA_ROLE_stream_window, NULL);
    for (int i = 0; i < 4 && !error; i++) {
        set(p, NSA_VALUE_compressed_dim, i % 2 ? c->value_dim : c->head_dim);
        set(p, NSA_VALUE_mlp, i / 2);
        error = pick(p, (NSASlot)(NSA_SLOT_LINEAR_KEYS + i), NSA_ROLE_stream_weighted, NULL);
    }
    return error;
}

static int plan_compressed(Planner *p) {
    const int error = pick(p, NSA_SLOT_COMPRESSED, NSA_ROLE_decode_compressed, NULL);
    if (error)
        return error;
    const NSAKernel *kernel = p->plan->kernels[NSA_SLOT_COMPRESSED];
    const int cell = nsa_constant(kernel, "CELL"), head_tiles = divided_up(get(p, NSA_VALUE_group), nsa_constant(kernel, "BM"));
    const int kv_heads = p->config->num_kv_heads, selection = get(p, NSA_VALUE_selection);
    set(p, NSA_VALUE_cells, divided_up(get(p, NSA_VALUE_per_block), cell));
    set(p, NSA_VALUE_per_tile, nsa_constant(kernel, "BN") / cell);
    const int64_t tiles = ((int64_t)selection * get(p, NSA_VALUE_cells) - 1) / get(p, NSA_VALUE_per_tile) + 1;
    set(p, NSA_VALUE_tiles, (int)tiles); /* one holds a compressed block or more, so there are no more than tokens */
    const int programs = kv_heads * head_tiles, few = at_least(nsa_tuning.few_parts, nsa_tuning.few_programs / programs);
    set(p, NSA_VALUE_splits, at_least(1, at_most(at_most(nsa_tuning.compressed_programs / programs, few), (int)tiles)));
    set_grid(p, NSA_SLOT_COMPRESSED, get(p, NSA_VALUE_splits), head_tiles, kv_heads);
    return NSA_OK;
}

static int plan_selection(Planner *p) {
    NSAPlan *plan = p->plan;
    const int n = p->config->num_selected_blocks, kv_heads = p->config->num_kv_heads;
    int error = pick(p, NSA_SLOT_CHOOSE, NSA_ROLE_decode_choose, "so many num_selected_blocks");
    if (error)
        return error;
    int chunks = divided_up(get(p, NSA_VALUE_selection), nsa_constant(plan->kernels[NSA_SLOT_CHOOSE], "BJ"));
    set_grid(p, NSA_SLOT_CHOOSE, chunks, kv_heads, 1);
    for (plan->again = 0; chunks > 1; plan->again++) {
        const NSASlot slot = (NSASlot)(NSA_SLOT_AGAIN + plan->again);
        if (plan->again == NSA_MAX_AGAIN)
            return nsa_fail(p->message, NSA_ERROR_INVALID_ARGUMENT, "max_seq_len must be less, got %d", p->config->max_seq_len);
        plan->counts[plan->again] = chunks * n;
        set(p, NSA_VALUE_count, chunks * n);
        error = pick(p, slot, NSA_ROLE_decode_choose_again, "so many num_selected_blocks");
        if (error)
            return error;
        chunks = divided_up(chunks * n, nsa_constant(plan->kernels[slot], "BJ"));
        set_grid(p, slot, chunks, kv_heads, 1);
    }
    return NSA_OK;
}

static int plan_tokens(Planner *p) {
    const NSAConfig *c = p->config;
    set(p, NSA_VALUE_token_tiles, 1);
    int error = pick(p, NSA_SLOT_TOKENS, NSA_ROLE_decode_tokens, NULL);
    if (error)
        return error;
    const NSAKernel *kernel = p->plan->kernels[NSA_SLOT_TOKENS];
    const int keys = nsa_constant(kernel, "BN"), head_tiles = divided_up(get(p, NSA_VALUE_group), nsa_constant(kernel, "BM"));
    const int64_t selected = (int64_t)c->num_selected_blocks * divided_up(c->selection_block_size, keys);
    const int64_t window = divided_up(get(p, NSA_VALUE_slots), keys);
    const int64_t programs = at_least(2, nsa_tuning.token_programs / (c->num_kv_heads * head_tiles));
    const int64_t wanted = (selected + window - 1) / programs + 1;
    set(p, NSA_VALUE_token_tiles, wanted < 1 << 20 ? (int)wanted : 1 << 20);
    error = pick(p, NSA_SLOT_TOKENS, NSA_ROLE_decode_tokens, NULL); /* one that is nearer to what a program should take */
    if (error)
        return error;
    const int tiles = at_most(get(p, NSA_VALUE_token_tiles), nsa_constant(p->plan->kernels[NSA_SLOT_TOKENS], "TILES"));
    const int splits = get(p, NSA_VALUE_splits), selected_parts = (int)((selected - 1) / tiles + 1);
    const int window_parts = (int)((window - 1) / tiles + 1);
    set(p, NSA_VALUE_token_tiles, tiles);
    set(p, NSA_VALUE_selected_parts, selected_parts);
    set(p, NSA_VALUE_first_win, splits + selected_parts);
    set(p, NSA_VALUE_parts, splits + selected_parts + window_parts);
    set_grid(p, NSA_SLOT_TOKENS, c->num_kv_heads, head_tiles, selected_parts + window_parts);
    set_grid(p, NSA_SLOT_MERGE, c->num_heads, 1, 1);
    return pick(p, NSA_SLOT_MERGE, NSA_ROLE_decode_merge, "so large a window_size, num_selected_blocks or selection_block_size");
}

static size_t reserve(NSAPlan *plan, size_t bytes) {
    const size_t offset = plan->bytes;
    plan->bytes += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return offset;
}

static void plan_workspace(Planner *p) {
    NSAPlan *plan = p->plan;
    const NSAConfig *c = p->config;
    const size_t heads = (size_t)c->num_heads, kv_heads = (size_t)c->num_kv_heads, number = 4;
    const size_t element = (size_t)nsa_dtype_size(c->dtype), tiles = (size_t)get(p, NSA_VALUE_tiles);
    const size_t key = kv_heads * (size_t)c->head_dim * element, value = kv_heads * (size_t)c->value_dim * element;
    const size_t rows = (size_t)compressed_rows(c), slots = (size_t)get(p, NSA_VALUE_slots);
    const size_t parts = heads * (size_t)get(p, NSA_VALUE_parts), n = (size_t)c->num_selected_blocks;
    const struct {
        NSAValueName name;
        size_t bytes;
    } tensors[] = {
        {NSA_VALUE_k_cmp, rows * key},
        {NSA_VALUE_v_cmp, rows * value},
        {NSA_VALUE_k_win, 2 * slots * key}, /* two copies: see stream_window.py */
        {NSA_VALUE_v_win, 2 * slots * value},
        {NSA_VALUE_gates, 3 * heads * number},
        {NSA_VALUE_lengths, number},
        {NSA_VALUE_part_o, parts * (size_t)c->value_dim * number},
        {NSA_VALUE_part_lse, parts * number},
        {NSA_VALUE_weights, heads * tiles * (size_t)get(p, NSA_VALUE_per_tile) * number},
        {NSA_VALUE_edges, heads * tiles * number},
        {NSA_VALUE_peaks, heads * tiles * number},
        {NSA_VALUE_importance, kv_heads * (size_t)get(p, NSA_VALUE_selection) * number},
        {NSA_VALUE_indices, kv_heads * n * number},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        plan->offsets[tensors[i].name] = reserve(plan, tensors[i].bytes);
    if (plan->again > 0)
        plan->offsets[NSA_VALUE_chosen] = reserve(plan, kv_heads * (size_t)plan->counts[0] * number);
    if (plan->again > 1)
        plan->other_chosen = reserve(plan, kv_heads * (size_t)plan->counts[1] * number);
}

int nsa_make_plan(const NSAConfig *config, int arch, const NSAKernel *kernels, int num_kernels, NSAPlan *plan, char *message) {
    Planner p = {config, kernels, num_kernels, arch ? arch : kernels[0].arch, plan, message};
    memset(plan, 0, sizeof *plan);
    set_numbers(&p);
    int error = plan_stream(&p);
    error = error ? error : plan_compressed(&p);
    error = error ? error : plan_selection(&p);
    error = error ? error : plan_tokens(&p);
    if (!error)
        plan_workspace(&p);
    return error;
}
