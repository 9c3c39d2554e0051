/* Every variant that the library was built with, on a GPU: for compute-sanitizer above all. Tensors are allocated to the byte, and
 * outputs are NaN before a call.
 *
 * Right numbers are checked by tests/aot, beside the reference; here that they are finite, and that a context that keeps the window
 * and compressed blocks from call to call gives what one gives that reads all keys anew. Ends with 77 where no GPU is. */
#include <math.h>
#include <nsa/nsa.h>
#include <stdint.h>
#include <stdlib.h>

#include "check.h"
#include "device.h"

enum { HIDDEN = 24, NO_GPU = 77 };

static const int DIMS[][2] = {{64, 64}, {128, 128}, {256, 256}, {192, 128}};
static const int LENGTHS[] = {1, 31, 32, 64, 65, 1000, 1001, 1700, 65537}; /* the window of 512 wraps around three times */
static const int DTYPES[] = {NSA_DTYPE_FP32, NSA_DTYPE_FP16, NSA_DTYPE_BF16};
static const int HEADS[][2] = {{4, 1}, {40, 2}}; /* query heads, KV heads; 20 to one are two tiles of them */

#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

static size_t item(int dtype) { return dtype == NSA_DTYPE_FP32 ? 4 : 2; }

/* Multiples of 1/64 between -1 and 1, exact in every dtype. */
static float small(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)((int)(*state >> 25) - 64) / 64.0f;
}

static void put(char *to, float x, int dtype) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == NSA_DTYPE_FP32) {
        memcpy(to, &bits, 4);
        return;
    }
    uint16_t half = (uint16_t)(bits >> 16);
    if (dtype == NSA_DTYPE_FP16) {
        const int exponent = (int)(bits >> 23 & 255) - 112; /* at least 9 here, or x is 0 */
        half = (uint16_t)((bits >> 16 & 0x8000u) | (x == 0 ? 0 : (uint32_t)exponent << 10 | (bits >> 13 & 1023u)));
    }
    memcpy(to, &half, 2);
}

static float get(const char *from, int dtype) {
    uint32_t bits = 0;
    uint16_t half;
    float x;
    if (dtype == NSA_DTYPE_FP32) {
        memcpy(&bits, from, 4);
    } else {
        memcpy(&half, from, 2);
        if (dtype == NSA_DTYPE_BF16) {
            bits = (uint32_t)half << 16;
        } else { /* infinity and NaN too; what is subnormal becomes 0 */
            const uint32_t exponent = half >> 10 & 31u;
            bits = (half & 0x8000u) << 16;
            if (exponent)
                bits |= (exponent == 31 ? 255u : exponent + 112) << 23 | (half & 1023u) << 13;
        }
    }
    memcpy(&x, &bits, 4);
    return x;
}

/* count numbers of which the i-th is the same for every count. */
static char *draw(size_t count, int dtype, uint32_t seed) {
    char *data = malloc(count * item(dtype));
    uint32_t state = seed * 2654435761u;
    for (size_t i = 0; data && i < count; i++)
        put(data + i * item(dtype), small(&state), dtype);
    return data;
}

static void *drawn(size_t count, int dtype, uint32_t seed) {
    char *data = draw(count, dtype, seed);
    void *memory = data ? device_upload(data, count * item(dtype)) : NULL;
    CHECK(memory != NULL);
    free(data);
    return memory;
}

typedef struct {
    void *gates, *embedding[2], *w1[2], *w2;
} Weights;

/* Gates, an MLP for keys, and a linear compressor of values. */
static void set_weights(NSAContext *ctx, const NSAConfig *config, Weights *w) {
    const size_t dims[2] = {(size_t)config->head_dim, (size_t)config->value_dim}, length = (size_t)config->block_length;
    w->gates = drawn(3 * dims[0], config->dtype, 11);
    for (int i = 0; i < 2; i++) {
        w->embedding[i] = drawn(length * dims[i], config->dtype, 12 + (uint32_t)i);
        w->w1[i] = drawn((i ? dims[1] : HIDDEN) * length * dims[i], config->dtype, 14 + (uint32_t)i);
    }
    w->w2 = drawn(dims[0] * HIDDEN, config->dtype, 16);
    const NSACompressionWeights keys = {w->embedding[0], w->w1[0], w->w2, HIDDEN};
    const NSACompressionWeights values = {w->embedding[1], w->w1[1], NULL, 0};
    CHECK_EQUAL(nsa_set_gate_weights(ctx, w->gates), NSA_OK);
    CHECK_EQUAL(nsa_set_compression_weights(ctx, &keys, &values), NSA_OK);
}

static void free_weights(Weights *w) {
    void *all[] = {w->gates, w->embedding[0], w->embedding[1], w->w1[0], w->w1[1], w->w2};
    for (int i = 0; i < COUNT(all); i++)
        device_free(all[i]);
}

static void attend(NSAContext *ctx, const void *q, const void *k, const void *v, int seq_len, char *result, size_t bytes) {
    memset(result, 0xff, bytes);
    void *output = device_upload(result, bytes);
    const int error = nsa_compute_attention(ctx, q, k, v, seq_len, output, NULL);
    CHECK_EQUAL(error, NSA_OK);
    if (error)
        fprintf(stderr, "%s\n", nsa_last_error(ctx));
    CHECK_EQUAL(device_download(result, output, bytes), 0);
    device_free(output);
}

/* Both ways at every length, up to which the sequence grows. */
static void compare(const NSAConfig *config, NSAContext *anew, NSAContext *kept) {
    const size_t heads = (size_t)config->num_heads, kv_heads = (size_t)config->num_kv_heads, size = item(config->dtype);
    const size_t row = kv_heads * (size_t)config->head_dim, row_v = kv_heads * (size_t)config->value_dim;
    const size_t numbers = heads * (size_t)config->value_dim;
    char *mine = malloc(numbers * size), *other = malloc(numbers * size);
    void *q = drawn(heads * (size_t)config->head_dim, config->dtype, 1);
    int held = 0;
    for (int i = 0; i < COUNT(LENGTHS) && mine && other && LENGTHS[i] <= config->max_seq_len; i++) {
        const size_t tokens = (size_t)LENGTHS[i];
        char *k = drawn(tokens * row, config->dtype, 2), *v = drawn(tokens * row_v, config->dtype, 3);
        CHECK_EQUAL(nsa_update_window(kept, k + (size_t)held * row * size, v + (size_t)held * row_v * size, LENGTHS[i] - held, NULL),
                    NSA_OK);
        held = LENGTHS[i];
        attend(anew, q, k, v, held, mine, numbers * size);
        attend(kept, q, k, v, held, other, numbers * size);
        float most = 0, apart = 0;
        int finite = 1;
        for (size_t n = 0; n < numbers; n++) {
            const float x = get(mine + n * size, config->dtype), y = get(other + n * size, config->dtype);
            finite = finite && isfinite(x) && isfinite(y);
            most = fmaxf(most, fabsf(x));
            apart = fmaxf(apart, fabsf(x - y));
        }
        CHECK(finite);
        CHECK(most > 0);
        CHECK(apart <= (config->dtype == NSA_DTYPE_FP32 ? 1e-4f : 2e-2f) * most);
        if (failures)
            fprintf(stderr, "%d tokens: %g apart, the largest %g\n", held, (double)apart, (double)most);
        device_free(k);
        device_free(v);
    }
    device_free(q);
    free(mine);
    free(other);
}

/* Whether the library has this variant. */
static int run(const int *dims, int dtype, const int *heads, int weighted) {
    NSAConfig config = nsa_create_default_config(dims[0], heads[0]);
    config.num_kv_heads = heads[1];
    config.value_dim = dims[1];
    config.dtype = dtype;
    config.max_seq_len = heads[1] == 1 ? LENGTHS[COUNT(LENGTHS) - 1] : 2000;
    NSAContext anew, kept;
    const int error = nsa_init(&anew, &config);
    if (error == NSA_ERROR_NOT_EXPORTED)
        return 0;
    config.incremental = 1;
    CHECK_EQUAL(error, NSA_OK);
    CHECK_EQUAL(nsa_init(&kept, &config), NSA_OK);
    if (!failures) {
        Weights weights[2];
        if (weighted) {
            set_weights(&anew, &config, &weights[0]);
            set_weights(&kept, &config, &weights[1]);
        }
        compare(&config, &anew, &kept);
        for (int i = 0; weighted && i < 2; i++)
            free_weights(&weights[i]);
    } else {
        fprintf(stderr, "%s\n", nsa_last_error(&anew));
    }
    nsa_free(&kept);
    nsa_free(&anew);
    if (failures)
        fprintf(stderr, "... D = %d/%d, dtype %d, %d heads on %d, %s\n", dims[0], dims[1], dtype, heads[0], heads[1],
                weighted ? "weights" : "means");
    return 1;
}

int main(void) {
    if (device_open())
        return NO_GPU;
    int ran = 0;
    for (int i = 0; i < COUNT(DIMS); i++)
        for (int j = 0; j < COUNT(DTYPES); j++)
            for (int n = 0; n < 2 * COUNT(HEADS) && !failures; n++)
                ran += run(DIMS[i], DTYPES[j], HEADS[n / 2], n % 2);
    CHECK(ran > 0);
    printf("%d cases\n", ran);
    device_close();
    return failures != 0;
}
