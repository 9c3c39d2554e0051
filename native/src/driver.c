#include "driver.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

#ifdef _WIN32
#include <windows.h>
#define DRIVER "nvcuda.dll"
static void *open_library(const char *name) { return (void *)LoadLibraryA(name); }
static void *find_symbol(void *library, const char *name) { return (void *)GetProcAddress((HMODULE)library, name); }
static void close_library(void *library) { FreeLibrary((HMODULE)library); }
static const char *why_not(void) { return "it could not be loaded"; }
#else
#include <dlfcn.h>
#define DRIVER "libcuda.so.1"
static void *open_library(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
static void *find_symbol(void *library, const char *name) { return dlsym(library, name); }
static void close_library(void *library) { dlclose(library); }
static const char *why_not(void) {
    const char *text = dlerror();
    return text ? text : "it could not be loaded";
}
#endif

typedef struct Symbol {
    const char *name;
    size_t offset;
    int needed;
} Symbol;

#define NSA_NEEDED(field, symbol, parameters) {symbol, offsetof(NSADriver, field), 1},
#define NSA_OPTIONAL(field, symbol, parameters) {symbol, offsetof(NSADriver, field), 0},
static const Symbol symbols[] = {NSA_DRIVER_FUNCTIONS(NSA_NEEDED) NSA_DRIVER_OPTIONAL(NSA_OPTIONAL)};

int nsa_driver_open(NSADriver *driver, char *message) {
    const char *asked = getenv("NSA_CUDA_DRIVER"), *name = asked && *asked ? asked : DRIVER;
    memset(driver, 0, sizeof *driver);
    driver->library = open_library(name);
    if (!driver->library)
        return nsa_fail(message, NSA_ERROR_NO_DEVICE, "no NVIDIA driver on this machine: %s", why_not());
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *found = find_symbol(driver->library, symbols[i].name);
        if (!found && symbols[i].needed) {
            nsa_driver_close(driver);
            return nsa_fail(message, NSA_ERROR_NO_DEVICE, "the NVIDIA driver %s is too old: it has no %s", name, symbols[i].name);
        }
        memcpy((char *)driver + symbols[i].offset, &found, sizeof found); /* ISO C has no cast from object to function pointers */
    }
    const CUresult result = driver->init(0);
    int count = 0;
    if (result != CUDA_SUCCESS || driver->device_count(&count) != CUDA_SUCCESS || count < 1) {
        const char *text = NULL;
        if (result == CUDA_SUCCESS || driver->error_string(result, &text) != CUDA_SUCCESS || !text)
            text = "the driver lists none";
        nsa_fail(message, NSA_ERROR_NO_DEVICE, "no NVIDIA GPU on this machine: %s", text);
        nsa_driver_close(driver);
        return NSA_ERROR_NO_DEVICE;
    }
    return NSA_OK;
}

void nsa_driver_close(NSADriver *driver) {
    if (driver->library)
        close_library(driver->library);
    memset(driver, 0, sizeof *driver);
}

int nsa_driver_check(const NSADriver *driver, CUresult result, const char *what, char *message) {
    const char *text = NULL;
    if (result == CUDA_SUCCESS)
        return NSA_OK;
    if (driver->error_string(result, &text) != CUDA_SUCCESS || !text)
        text = "an error that the driver does not know";
    return nsa_fail(message, result == CUDA_ERROR_OUT_OF_MEMORY ? NSA_ERROR_OUT_OF_MEMORY : NSA_ERROR_CUDA,
                    "%s failed: %s (CUDA error %d)", what, text, result);
}
