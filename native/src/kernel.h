/* The exported kernels: the table that python -m nsa.aot writes, picking one out of it, and launching it. */
#ifndef NSA_KERNEL_H
#define NSA_KERNEL_H

#include <stdint.h>

#include "driver.h"
#include "values.h"

#define NSA_ROLES(X)                                                                                                           \
    X(stream_begin) X(stream_weighted) X(stream_window) X(decode_compressed) X(decode_choose) X(decode_choose_again)           \
    X(decode_tokens) X(decode_merge)

#define NSA_ROLE_NAME(name) NSA_ROLE_##name,
typedef enum NSARole { NSA_ROLES(NSA_ROLE_NAME) NSA_NUM_ROLES } NSARole;
#undef NSA_ROLE_NAME

/* Of the elements of a kernel's tensors. The first three are the NSADtypes; any: it reads none of the caller's tensors. */
typedef enum NSAType { NSA_TYPE_fp32, NSA_TYPE_fp16, NSA_TYPE_bf16, NSA_TYPE_i32, NSA_TYPE_i16, NSA_TYPE_any } NSAType;

typedef enum NSAPassed { NSA_PASSED_POINTER, NSA_PASSED_INT, NSA_PASSED_FLOAT } NSAPassed;

typedef struct NSAParameter {
    NSAValueName value;
    NSAPassed passed;
} NSAParameter;

/* How a constant is held against a value: is, equal; at_least, not below it, and the lowest such is picked; nearest, likewise, or
 * the highest that there is. */
typedef enum NSARule { NSA_RULE_none, NSA_RULE_is, NSA_RULE_at_least, NSA_RULE_nearest } NSARule;

typedef struct NSAConstant {
    const char *name;
    int number;
    NSARule rule;
    NSAValueName value;
} NSAConstant;

#define NSA_MAX_PARAMETERS 48
#define NSA_MAX_CONSTANTS 12

typedef struct NSAKernel {
    NSARole role;
    const char *symbol;
    int arch; /* compute capability, as in 90 */
    NSAType type;
    int num_warps;
    int shared; /* bytes of dynamic shared memory */
    uint32_t offset, size; /* of the cubin in nsa_cubins */
    int dependent;         /* whether it waits for the launch before it, and so may start early; only from 9.0 on */
    const NSAParameter *parameters;
    int num_parameters;
    NSAConstant constants[NSA_MAX_CONSTANTS]; /* up to the first without a name; those with rules first, as they count */
} NSAKernel;

/* Programs that fill a GPU, of nsa/decode_tuning.py. */
typedef struct NSATuning {
    int compressed_programs, few_programs, few_parts, token_programs;
} NSATuning;

/* Written by the export. */
extern const NSAKernel nsa_kernels[];
extern const int nsa_num_kernels;
extern const NSATuning nsa_tuning;
extern const char nsa_exported[];   /* what there is, for messages */
extern const unsigned char nsa_cubins[]; /* embed.S */

/* Whether code compiled for one compute capability runs on another. */
int nsa_arch_runs(int compiled, int device);

/* The kernel of a role for a device and a dtype whose constants fit the values; NULL if none was exported. */
const NSAKernel *nsa_pick(const NSAKernel *kernels, int num_kernels, NSARole role, int arch, int dtype, const NSAValue *values);

/* A constant that the kernel must have. */
int nsa_constant(const NSAKernel *kernel, const char *name);

typedef struct NSALoaded {
    const NSAKernel *kernel; /* NULL: none */
    CUmodule module;
    CUfunction function;
} NSALoaded;

/* In the current CUDA context. A dependent kernel may start before the one before it on the stream has ended: step.c says why that
 * is right. Where the driver cannot do so it follows like any other, and its wait returns at once. */
int nsa_load(const NSADriver *driver, const NSAKernel *kernel, NSALoaded *loaded, char *message);
int nsa_launch(const NSADriver *driver, const NSALoaded *loaded, const NSAValue *values, const unsigned grid[3],
               nsa_stream_t stream, char *message);

#endif
