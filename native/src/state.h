/* What a context holds between calls. */
#ifndef NSA_STATE_H
#define NSA_STATE_H

#include "driver.h"
#include "plan.h"

typedef struct NSAState {
    NSAConfig config;
    NSADriver driver;
    NSAPlan plan; /* after nsa_init with the workspace's pointers among the values */
    NSALoaded loaded[NSA_NUM_SLOTS];
    CUcontext context;
    CUdevice device;
    int retained; /* whether context is the primary one, and ours to release */
    CUdeviceptr workspace;
    uint64_t window_seen; /* tokens that were written into the window */
    int compressed_len;   /* tokens whose blocks an incremental context has */
    const void *gate_weights;
    NSACompressionWeights compression[2]; /* keys, values; the mean where w1 is NULL */
} NSAState;

/* The state of a context that nsa_init made and nsa_free has not freed, else NULL and the message. */
NSAState *nsa_alive(NSAContext *ctx);

/* NSA_OK if the pointer is one that kernels can read: not NULL, aligned. */
int nsa_check_pointer(NSAContext *ctx, const char *name, const void *pointer);

/* Make the context's CUDA context current for this thread, and the one before it again. */
int nsa_enter(NSAState *state, char *message);
void nsa_leave(NSAState *state);

#endif
