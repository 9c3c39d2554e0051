/* Attention of the newest token over the keys and values of a file.
 *
 *     decode FILE SEQ_LEN NUM_HEADS HEAD_DIM
 *
 * FILE holds float32 numbers and nothing else: query [NUM_HEADS, HEAD_DIM], keys [SEQ_LEN, HK, HEAD_DIM], values likewise, where
 * HK is what nsa_create_default_config makes of NUM_HEADS. Prints the first numbers of every head's output. */
#include <nsa/nsa.h>
#include <stdio.h>
#include <stdlib.h>

#include "device.h"

static float *read_floats(FILE *file, size_t count) {
    float *data = malloc(count * sizeof *data);
    if (data && fread(data, sizeof *data, count, file) == count)
        return data;
    fprintf(stderr, "the file ends before %zu more numbers\n", count);
    free(data);
    return NULL;
}

static void *upload_floats(FILE *file, size_t count) {
    float *data = read_floats(file, count);
    void *memory = data ? device_upload(data, count * sizeof *data) : NULL;
    free(data);
    return memory;
}

static int attend(const NSAConfig *config, FILE *file, int seq_len) {
    const size_t heads = (size_t)config->num_heads, dim = (size_t)config->head_dim;
    const size_t rows = (size_t)seq_len * (size_t)config->num_kv_heads;
    void *query = upload_floats(file, heads * dim), *keys = upload_floats(file, rows * dim);
    void *values = upload_floats(file, rows * dim);
    float *result = calloc(heads * dim, sizeof *result);
    void *output = result ? device_upload(result, heads * dim * sizeof *result) : NULL;
    NSAContext ctx;
    int failed = !query || !keys || !values || !output;
    if (!failed && nsa_init(&ctx, config) == NSA_OK) {
        failed = nsa_compute_attention(&ctx, query, keys, values, seq_len, output, NULL) != NSA_OK;
        if (failed)
            fprintf(stderr, "%s\n", nsa_last_error(&ctx));
        nsa_free(&ctx);
    } else if (!failed) {
        fprintf(stderr, "%s\n", nsa_last_error(&ctx));
        failed = 1;
    }
    failed = failed || device_download(result, output, heads * dim * sizeof *result);
    for (size_t head = 0; head < heads && !failed; head++)
        printf("head %zu: %g %g %g %g ...\n", head, result[head * dim], result[head * dim + 1], result[head * dim + 2],
               result[head * dim + 3]);
    free(result);
    device_free(output);
    device_free(values);
    device_free(keys);
    device_free(query);
    return failed;
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: decode FILE SEQ_LEN NUM_HEADS HEAD_DIM\n");
        return 2;
    }
    FILE *file = fopen(argv[1], "rb");
    const int seq_len = atoi(argv[2]);
    NSAConfig config = nsa_create_default_config(atoi(argv[4]), atoi(argv[3]));
    if (!file || seq_len < 1 || config.num_heads < 1 || config.head_dim < 4) {
        fprintf(stderr, "%s cannot be read, or a size is not positive\n", argv[1]);
        return 2;
    }
    config.max_seq_len = seq_len;
    int failed = device_open();
    if (!failed) {
        failed = attend(&config, file, seq_len);
        device_close();
    }
    fclose(file);
    return failed;
}
