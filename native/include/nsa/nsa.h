/* Native Sparse Attention (arXiv 2502.11089), one decode step at a time, on NVIDIA GPUs.
 *
 * Every function returns NSA_OK or an NSAError, and leaves a sentence about it in the context, for nsa_last_error. Work on the GPU
 * is asynchronous on the stream that is passed; nothing is allocated after nsa_init, so calls can be captured in a CUDA graph.
 * A context is used by one thread at a time; different contexts don't know each other.
 *
 * All tensors are contiguous, in GPU memory that the device of the context can read, aligned to 16 bytes, and of the type that
 * config.dtype says. HQ, HK, D, DV, l, w stand for num_heads, num_kv_heads, head_dim, value_dim, block_length, window_size.
 */
#ifndef NSA_NSA_H
#define NSA_NSA_H

#include <stddef.h>
#include <stdint.h>

#define NSA_VERSION_MAJOR 0
#define NSA_VERSION_MINOR 1
#define NSA_VERSION_PATCH 0

#if defined(_WIN32) && defined(NSA_BUILDING_SHARED)
#define NSA_API __declspec(dllexport)
#elif defined(_WIN32) && defined(NSA_SHARED)
#define NSA_API __declspec(dllimport)
#elif defined(__GNUC__)
#define NSA_API __attribute__((visibility("default")))
#else
#define NSA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* A CUstream or cudaStream_t; NULL is the default stream. */
typedef struct CUstream_st *nsa_stream_t;

typedef enum NSAError {
    NSA_OK = 0,
    NSA_ERROR_INVALID_ARGUMENT = 1, /* an argument or a field that cannot be */
    NSA_ERROR_NO_DEVICE = 2,        /* no driver, no GPU */
    NSA_ERROR_NOT_EXPORTED = 3,     /* this library was built without the kernels that it takes */
    NSA_ERROR_OUT_OF_MEMORY = 4,    /* on the GPU or on the host */
    NSA_ERROR_CUDA = 5              /* what the driver says of anything else */
} NSAError;

typedef enum NSADtype { NSA_DTYPE_FP32 = 0, NSA_DTYPE_FP16 = 1, NSA_DTYPE_BF16 = 2 } NSADtype;

/* Made by nsa_create_default_config, then changed field by field. Every size must be positive. */
typedef struct NSAConfig {
    uint32_t struct_size;     /* of the header that the caller was compiled with; leave it */
    int head_dim;             /* D, channels of a query or key head */
    int num_heads;            /* HQ, query heads */
    int num_kv_heads;         /* HK, divides HQ; default the largest divisor that is at most max(1, HQ / 16) */
    int value_dim;            /* DV, channels of a value head; default D */
    int block_length;         /* l = 32, tokens of a compressed block */
    int block_stride;         /* d = 16, divides l and s: tokens between the starts of two compressed blocks */
    int selection_block_size; /* s = 64, at least l: tokens of a selection block */
    int num_selected_blocks;  /* n = 16, selection blocks a query reads, forced ones included */
    int num_initial_blocks;   /* 1, forced blocks at the start */
    int num_local_blocks;     /* 2, forced blocks that end with the query's own */
    int window_size;          /* w = 512, tokens of the sliding window, the query's own included */
    int dtype;                /* an NSADtype, default NSA_DTYPE_FP32 */
    int max_seq_len;          /* 131072; the workspace grows with it */
    int incremental;          /* 0; 1: compress only what was added since the last call */
    int device;               /* -1: the device of the thread's current CUDA context, or else 0 */
    double softmax_scale;     /* factor on q . k; default D to the power of -1/2 */
} NSAConfig;

#define NSA_ERROR_LENGTH 512

/* Filled by nsa_init. It may be moved while no call uses it; its fields are the library's. */
typedef struct NSAContext {
    struct NSAState *state;
    uint64_t check;
    char error[NSA_ERROR_LENGTH];
} NSAContext;

/* A compressor's weights. They stay the caller's, and are read by every call until they are replaced. */
typedef struct NSACompressionWeights {
    const void *embedding; /* [l, D], added to each block */
    const void *w1;        /* linear: [D, l * D]; MLP: [hidden, l * D] */
    const void *w2;        /* MLP: [D, hidden], after SiLU; NULL for linear */
    int hidden;            /* 0 for linear */
} NSACompressionWeights;

/* The paper's configuration for these head sizes. What cannot be is refused by nsa_init. */
NSA_API NSAConfig nsa_create_default_config(int head_dim, int num_heads);

/* Take a device, load its kernels, and allocate the workspace. ctx need not have been set to anything; whatever it held is not
 * freed. Where the thread has a current CUDA context on the device, that one is used, and must live until nsa_free; else the
 * device's primary context, which the CUDA runtime and PyTorch use too. */
NSA_API int nsa_init(NSAContext *ctx, const NSAConfig *config);

/* Attention of the newest token, at position seq_len - 1.
 *
 *   query    [HQ, D]
 *   keys     [seq_len, HK, D], this token's included
 *   values   [seq_len, HK, DV]
 *   output   [HQ, DV]
 *
 * The window is read out of the circular buffer if that holds min(w, seq_len) tokens, else it is the tail of keys and values. With
 * config.incremental, keys and values must be those of the call before, with tokens added, until nsa_reset. */
NSA_API int nsa_compute_attention(NSAContext *ctx, const void *query, const void *keys, const void *values, int seq_len,
                                  void *output, nsa_stream_t stream);

/* Write new_keys [num_new, HK, D] and new_values [num_new, HK, DV], the newest tokens, into the circular buffer. */
NSA_API int nsa_update_window(NSAContext *ctx, const void *new_keys, const void *new_values, int num_new, nsa_stream_t stream);

/* Forget the window and what was compressed; weights stay. */
NSA_API int nsa_reset(NSAContext *ctx);

/* Gates sigmoid(weights q) of each head's query, weights [3, D] for compressed, selected, window; NULL: 1/3 each. They stay the
 * caller's, and are read by every call until they are replaced. */
NSA_API int nsa_set_gate_weights(NSAContext *ctx, const void *weights);

/* The compressors of keys and of values (there DV is the D of the weights' shapes); NULL: the mean. Forgets what was compressed. */
NSA_API int nsa_set_compression_weights(NSAContext *ctx, const NSACompressionWeights *keys,
                                        const NSACompressionWeights *values);

/* Bytes of GPU memory that nsa_init allocates for config, with no device needed; with config NULL, those of ctx. With a config, ctx
 * takes the message only and may be NULL. */
NSA_API int nsa_workspace_size(NSAContext *ctx, const NSAConfig *config, size_t *bytes);

/* What went wrong in the last call that failed; "" if none did. Never NULL; valid until the next call with ctx. */
NSA_API const char *nsa_last_error(const NSAContext *ctx);

/* Wait for the device and free all. Any later call but nsa_init is an error; freeing twice is not. */
NSA_API int nsa_free(NSAContext *ctx);

/* "0.1.0" */
NSA_API const char *nsa_version(void);

/* "NSA_ERROR_NO_DEVICE" for NSA_ERROR_NO_DEVICE */
NSA_API const char *nsa_error_name(int error);

#ifdef __cplusplus
}
#endif

#endif
