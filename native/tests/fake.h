/* The test's hold on the fake driver that the library loads too: NSA_CUDA_DRIVER names it. */
#ifndef FAKE_H
#define FAKE_H

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda.h"

static void *fake_library(void) {
    void *library = dlopen(getenv("NSA_CUDA_DRIVER"), RTLD_NOW);
    if (!library) {
        fprintf(stderr, "NSA_CUDA_DRIVER must name the fake driver: %s\n", dlerror());
        exit(2);
    }
    return library;
}

static inline int fake_has(const char *name) { return dlsym(fake_library(), name) != NULL; }

static inline void *fake_symbol(const char *name) {
    void *found = dlsym(fake_library(), name);
    if (!found)
        exit(2);
    return found;
}

static inline Fake *open_fake(void) {
    FakeCuda get;
    void *found = fake_symbol("fake_cuda");
    memcpy(&get, &found, sizeof get);
    return get();
}

#endif
