#include "device.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct CUctx_st *CUcontext;

static struct {
    int (*init)(unsigned);
    int (*retain)(CUcontext *, int);
    int (*release)(int);
    int (*push)(CUcontext);
    int (*allocate)(uint64_t *, size_t);
    int (*free)(uint64_t);
    int (*to_device)(uint64_t, const void *, size_t);
    int (*to_host)(void *, uint64_t, size_t);
} cuda;

static int find(void *library, void *function, const char *name) {
    void *found = dlsym(library, name);
    memcpy(function, &found, sizeof found);
    return !found;
}

int device_open(void) {
    const char *asked = getenv("NSA_CUDA_DRIVER");
    void *library = dlopen(asked ? asked : "libcuda.so.1", RTLD_NOW);
    CUcontext context;
    if (!library || find(library, &cuda.init, "cuInit") || find(library, &cuda.retain, "cuDevicePrimaryCtxRetain") ||
        find(library, &cuda.release, "cuDevicePrimaryCtxRelease_v2") || find(library, &cuda.push, "cuCtxPushCurrent_v2") ||
        find(library, &cuda.allocate, "cuMemAlloc_v2") || find(library, &cuda.free, "cuMemFree_v2") ||
        find(library, &cuda.to_device, "cuMemcpyHtoD_v2") || find(library, &cuda.to_host, "cuMemcpyDtoH_v2") || cuda.init(0) ||
        cuda.retain(&context, 0) || cuda.push(context)) {
        fprintf(stderr, "no NVIDIA GPU on this machine\n");
        return 1;
    }
    return 0;
}

void *device_upload(const void *data, size_t bytes) {
    uint64_t memory = 0;
    if (cuda.allocate(&memory, bytes) || cuda.to_device(memory, data, bytes)) {
        fprintf(stderr, "%zu bytes of GPU memory are not there\n", bytes);
        return NULL;
    }
    return (void *)(uintptr_t)memory;
}

int device_download(void *data, const void *memory, size_t bytes) { return cuda.to_host(data, (uintptr_t)memory, bytes) != 0; }

void device_free(void *memory) {
    if (memory)
        cuda.free((uintptr_t)memory);
}

void device_close(void) { cuda.release(0); }
