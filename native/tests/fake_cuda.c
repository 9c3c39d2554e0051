#include "fake_cuda.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { MAJOR = 75, MINOR = 76, DEPTH = 16 };

typedef struct Block {
    struct Block *next;
    void *memory;
    size_t bytes;
} Block;

typedef struct Module {
    const void *image;
    char symbol[64];
} Module;

static Fake fake = {.devices = 1, .arch = 90, .memory = (size_t)8 << 30};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks;
static char contexts[2][8]; /* their addresses are the primary contexts of two devices */
static _Thread_local void *stack[DEPTH];
static _Thread_local int depth;

Fake *fake_cuda(void) { return &fake; }

/* For a caller that does not know the struct. */
void fake_on_launch(void (*on_launch)(const FakeLaunch *, void **)) { fake.on_launch = on_launch; }

/* For a caller that has a context of its own. */
void *fake_primary(int device) { return contexts[device]; }

static int enter(const char *function) {
    pthread_mutex_lock(&lock);
    fake.calls++;
    if (fake.failing && !strcmp(fake.failing, function) && fake.failing_after-- <= 0) {
        fake.failing = NULL;
        pthread_mutex_unlock(&lock);
        return fake.failing_with;
    }
    return OK;
}

static int leave(int result) {
    pthread_mutex_unlock(&lock);
    return result;
}

#define ENTER                                                                                                                  \
    do {                                                                                                                       \
        const int failed = enter(__func__);                                                                                    \
        if (failed)                                                                                                            \
            return failed;                                                                                                     \
    } while (0)

#define NEEDS_CONTEXT                                                                                                          \
    do {                                                                                                                       \
        if (!depth)                                                                                                            \
            return leave(INVALID_CONTEXT);                                                                                     \
    } while (0)

int cuInit(unsigned flags) {
    ENTER;
    return leave(flags ? INVALID_VALUE : fake.devices ? OK : NO_DEVICE);
}

int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : error == NO_DEVICE ? "no CUDA-capable device is detected" : "a fake error";
    return OK;
}

int cuDeviceGetCount(int *count) {
    ENTER;
    *count = fake.devices;
    return leave(OK);
}

int cuDeviceGet(int *device, int ordinal) {
    ENTER;
    *device = ordinal;
    return leave(ordinal < fake.devices ? OK : INVALID_VALUE);
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    (void)device;
    *value = attribute == MAJOR ? fake.arch / 10 : fake.arch % 10;
    return leave(attribute == MAJOR || attribute == MINOR ? OK : INVALID_VALUE);
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER;
    *context = contexts[device];
    fake.retained++;
    return leave(OK);
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER;
    (void)device;
    fake.retained--;
    return leave(OK);
}

int cuCtxGetCurrent(void **context) {
    ENTER;
    *context = depth ? stack[depth - 1] : NULL;
    return leave(OK);
}

int cuCtxGetDevice(int *device) {
    ENTER;
    NEEDS_CONTEXT;
    *device = stack[depth - 1] == contexts[1];
    return leave(OK);
}

int cuCtxPushCurrent_v2(void *context) {
    ENTER;
    if (depth == DEPTH)
        return leave(INVALID_VALUE);
    stack[depth++] = context;
    return leave(OK);
}

int cuCtxPopCurrent_v2(void **context) {
    ENTER;
    NEEDS_CONTEXT;
    *context = stack[--depth];
    return leave(OK);
}

int cuCtxSynchronize(void) {
    ENTER;
    NEEDS_CONTEXT;
    fake.synchronized++;
    return leave(OK);
}

int cuModuleLoadData(void **module, const void *image) {
    ENTER;
    NEEDS_CONTEXT;
    Module *made = calloc(1, sizeof *made);
    if (memcmp(image, "\177ELF", 4) || (uintptr_t)image % 64 || !made) {
        free(made);
        return leave(INVALID_VALUE);
    }
    made->image = image;
    *module = made;
    fake.modules++;
    return leave(OK);
}

int cuModuleUnload(void *module) {
    ENTER;
    NEEDS_CONTEXT;
    free(module);
    fake.modules--;
    return leave(OK);
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    ENTER;
    NEEDS_CONTEXT;
    Module *made = module;
    strncpy(made->symbol, name, sizeof made->symbol - 1);
    *function = made;
    return leave(OK);
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    ENTER;
    NEEDS_CONTEXT;
    return leave(function && attribute == 8 && value > 0 ? OK : INVALID_VALUE);
}

/* What a kernel does not write it must not read: every byte starts as part of a NaN. */
int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) {
    ENTER;
    NEEDS_CONTEXT;
    Block *block = calloc(1, sizeof *block);
    if (!bytes || fake.bytes + bytes > fake.memory || !block || posix_memalign(&block->memory, 256, bytes)) {
        free(block);
        return leave(bytes ? OUT_OF_MEMORY : INVALID_VALUE);
    }
    memset(block->memory, 0xff, bytes);
    block->bytes = bytes;
    block->next = blocks;
    blocks = block;
    fake.allocations++;
    fake.blocks++;
    fake.bytes += bytes;
    *pointer = (uintptr_t)block->memory;
    return leave(OK);
}

int cuMemFree_v2(uint64_t pointer) {
    ENTER;
    NEEDS_CONTEXT;
    for (Block **place = &blocks; *place; place = &(*place)->next) {
        Block *block = *place;
        if ((uintptr_t)block->memory != pointer)
            continue;
        *place = block->next;
        fake.blocks--;
        fake.bytes -= block->bytes;
        free(block->memory);
        free(block);
        return leave(OK);
    }
    return leave(INVALID_VALUE);
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    ENTER;
    NEEDS_CONTEXT;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return leave(OK);
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    ENTER;
    NEEDS_CONTEXT;
    memcpy(to, (const void *)(uintptr_t)from, bytes);
    return leave(OK);
}

static int launch(const Module *module, FakeLaunch launch, void **parameters) {
    const unsigned *grid = launch.grid;
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535)
        return leave(INVALID_VALUE);
    launch.symbol = module->symbol;
    launch.image = module->image;
    launch.context = stack[depth - 1];
    if (fake.num_launches < FAKE_MAX_LAUNCHES)
        fake.launches[fake.num_launches++] = launch;
    if (fake.on_launch)
        fake.on_launch(&launch, parameters);
    return leave(OK);
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    ENTER;
    NEEDS_CONTEXT;
    if (block_y != 1 || block_z != 1 || extra)
        return leave(INVALID_VALUE);
    return launch(function, (FakeLaunch){.grid = {x, y, z}, .threads = block_x, .shared = shared, .stream = stream}, parameters);
}

/* A driver of before CUDA 11.8 has none of this. */
#ifndef FAKE_OLD
typedef struct Attribute {
    int id, pad;
    unsigned char value[64];
} Attribute;

typedef struct Config {
    unsigned grid[3], block[3], shared;
    void *stream;
    const Attribute *attributes;
    unsigned count;
} Config;

int cuLaunchKernelEx(const void *given, void *function, void **parameters, void **extra) {
    ENTER;
    NEEDS_CONTEXT;
    const Config *config = given;
    FakeLaunch made = {.threads = config->block[0], .shared = config->shared, .stream = config->stream};
    if (config->block[1] != 1 || config->block[2] != 1 || extra)
        return leave(INVALID_VALUE);
    for (unsigned i = 0; i < config->count; i++) {
        int value;
        memcpy(&value, config->attributes[i].value, sizeof value);
        if (config->attributes[i].id != 6 || value != 1 || fake.arch < 90)
            return leave(INVALID_VALUE);
        made.dependent = 1;
    }
    memcpy(made.grid, config->grid, sizeof made.grid);
    return launch(function, made, parameters);
}
#endif
