/* A CUDA driver that computes nothing: "device" memory is the host's, launches are written down. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>

#define FAKE_MAX_LAUNCHES 4096

typedef struct FakeLaunch {
    const char *symbol;
    const void *image; /* of the module that has it */
    unsigned grid[3], threads, shared;
    void *stream, *context;
    int dependent; /* whether it may start before the launch before it has ended */
} FakeLaunch;

typedef struct Fake {
    int devices, arch;        /* what there is; 1 and 90 */
    size_t memory;            /* bytes; more is out of memory */
    const char *failing;      /* this function fails ... */
    int failing_after;        /* ... after so many calls that succeed ... */
    int failing_with;         /* ... with this error */
    int calls;                /* of any function but cuGetErrorString */
    int allocations, blocks;  /* calls that succeeded; blocks that live */
    size_t bytes;             /* that live */
    int modules, retained;    /* that live */
    int synchronized;         /* calls of cuCtxSynchronize */
    int num_launches;
    FakeLaunch launches[FAKE_MAX_LAUNCHES];
    void (*on_launch)(const FakeLaunch *launch, void **parameters); /* called with what a launch got, if not NULL */
} Fake;

/* What the driver counts and obeys; symbol fake_cuda. */
typedef Fake *(*FakeCuda)(void);

#endif
