/* The part of the CUDA driver API that is used, found at run time: the library links and loads where there is no driver. */
#ifndef NSA_DRIVER_H
#define NSA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "nsa/nsa.h"

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;

typedef struct CUlaunchAttribute {
    int id; /* an enum there */
    char pad[4];
    union {
        char bytes[64];
        int programmatic_stream_serialization;
    } value;
} CUlaunchAttribute;

typedef struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    nsa_stream_t stream;
    CUlaunchAttribute *attributes;
    unsigned num_attributes;
} CUlaunchConfig;

/* As in cuda.h of CUDA 12 and 13. */
_Static_assert(sizeof(CUlaunchAttribute) == 72 && offsetof(CUlaunchAttribute, value) == 8, "CUlaunchAttribute");
_Static_assert(sizeof(void *) != 8 || (sizeof(CUlaunchConfig) == 56 && offsetof(CUlaunchConfig, stream) == 32 &&
                                       offsetof(CUlaunchConfig, num_attributes) == 48),
               "CUlaunchConfig");

/* Numbers of cuda.h, which never change their meaning. */
enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
};

/* Field of NSADriver, symbol of the driver, parameters. */
#define NSA_DRIVER_FUNCTIONS(X)                                                                                                \
    X(init, "cuInit", (unsigned flags))                                                                                        \
    X(error_string, "cuGetErrorString", (CUresult error, const char **text))                                                   \
    X(device_count, "cuDeviceGetCount", (int *count))                                                                          \
    X(device_get, "cuDeviceGet", (CUdevice * device, int ordinal))                                                             \
    X(device_attribute, "cuDeviceGetAttribute", (int *value, int attribute, CUdevice device))                                  \
    X(primary_retain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device))                                      \
    X(primary_release, "cuDevicePrimaryCtxRelease_v2", (CUdevice device))                                                      \
    X(context_current, "cuCtxGetCurrent", (CUcontext * context))                                                               \
    X(context_device, "cuCtxGetDevice", (CUdevice * device))                                                                   \
    X(context_push, "cuCtxPushCurrent_v2", (CUcontext context))                                                                \
    X(context_pop, "cuCtxPopCurrent_v2", (CUcontext * context))                                                                \
    X(context_synchronize, "cuCtxSynchronize", (void))                                                                         \
    X(module_load, "cuModuleLoadData", (CUmodule * module, const void *image))                                                 \
    X(module_unload, "cuModuleUnload", (CUmodule module))                                                                      \
    X(module_function, "cuModuleGetFunction", (CUfunction * function, CUmodule module, const char *name))                      \
    X(function_attribute, "cuFuncSetAttribute", (CUfunction function, int attribute, int value))                               \
    X(memory_allocate, "cuMemAlloc_v2", (CUdeviceptr * pointer, size_t bytes))                                                 \
    X(memory_free, "cuMemFree_v2", (CUdeviceptr pointer))                                                                      \
    X(launch, "cuLaunchKernel",                                                                                                \
      (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,             \
       unsigned block_z, unsigned shared, nsa_stream_t stream, void **parameters, void **extra))

/* Of CUDA 11.8 and newer; NULL where the driver has it not. */
#define NSA_DRIVER_OPTIONAL(X)                                                                                                 \
    X(launch_extended, "cuLaunchKernelEx",                                                                                     \
      (const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra))

#define NSA_DRIVER_FIELD(field, symbol, parameters) CUresult(*field) parameters;
typedef struct NSADriver {
    void *library;
    NSA_DRIVER_FUNCTIONS(NSA_DRIVER_FIELD)
    NSA_DRIVER_OPTIONAL(NSA_DRIVER_FIELD)
} NSADriver;
#undef NSA_DRIVER_FIELD

/* Load libcuda.so.1 or nvcuda.dll, or what the environment variable NSA_CUDA_DRIVER names, and initialise it. */
int nsa_driver_open(NSADriver *driver, char *message);
void nsa_driver_close(NSADriver *driver);

/* NSA_OK, or the message that `what` failed and what the driver says about it. */
int nsa_driver_check(const NSADriver *driver, CUresult result, const char *what, char *message);

#endif
