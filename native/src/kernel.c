#include "kernel.h"

#include <assert.h>
#include <limits.h>
#include <stddef.h>
#include <string.h>

#include "error.h"

int nsa_arch_runs(int compiled, int device) {
    /* From 9.0 on Triton compiles for what one capability alone has; before, a minor version runs what earlier ones do. */
    return compiled == device || (device < 90 && compiled / 10 == device / 10 && compiled <= device);
}

static int type_fits(NSAType type, int dtype) {
    return type == NSA_TYPE_any || (int)type == dtype || type == (dtype == NSA_DTYPE_FP32 ? NSA_TYPE_i32 : NSA_TYPE_i16);
}

static int rules_fit(const NSAKernel *kernel, const NSAValue *values) {
    for (const NSAConstant *c = kernel->constants; c < kernel->constants + NSA_MAX_CONSTANTS && c->name; c++) {
        const int value = values[c->value].number;
        if ((c->rule == NSA_RULE_is && c->number != value) || (c->rule == NSA_RULE_at_least && c->number < value))
            return 0;
    }
    return 1;
}

/* Below 0 if a serves the value better than b: not below it, and otherwise the closer one. */
static int compare(int a, int b, int value) {
    if ((a >= value) != (b >= value))
        return a >= value ? -1 : 1;
    return a >= value ? a - b : b - a;
}

/* Both fit, and have the same constants. */
static int better(const NSAKernel *a, const NSAKernel *b, const NSAValue *values) {
    if (a->arch != b->arch)
        return a->arch > b->arch;
    for (int i = 0; i < NSA_MAX_CONSTANTS && a->constants[i].name; i++) {
        const NSAConstant *c = &a->constants[i];
        const int order = compare(c->number, b->constants[i].number, values[c->value].number);
        if (c->rule != NSA_RULE_none && order)
            return order < 0;
    }
    return 0;
}

const NSAKernel *nsa_pick(const NSAKernel *kernels, int num_kernels, NSARole role, int arch, int dtype, const NSAValue *values) {
    const NSAKernel *best = NULL;
    for (const NSAKernel *k = kernels; k < kernels + num_kernels; k++)
        if (k->role == role && nsa_arch_runs(k->arch, arch) && type_fits(k->type, dtype) && rules_fit(k, values) &&
            (!best || better(k, best, values)))
            best = k;
    return best;
}

int nsa_constant(const NSAKernel *kernel, const char *name) {
    for (int i = 0; i < NSA_MAX_CONSTANTS && kernel->constants[i].name; i++)
        if (!strcmp(kernel->constants[i].name, name))
            return kernel->constants[i].number;
    assert(!"a constant that the export does not have");
    return 1;
}

int nsa_load(const NSADriver *driver, const NSAKernel *kernel, NSALoaded *loaded, char *message) {
    int error = nsa_driver_check(driver, driver->module_load(&loaded->module, nsa_cubins + kernel->offset), kernel->symbol, message);
    if (error)
        return error;
    loaded->kernel = kernel;
    error = nsa_driver_check(driver, driver->module_function(&loaded->function, loaded->module, kernel->symbol), kernel->symbol,
                             message);
    if (error || kernel->shared <= 48 << 10) /* what every kernel may have without asking */
        return error;
    return nsa_driver_check(
        driver, driver->function_attribute(loaded->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel->shared),
        kernel->symbol, message);
}

int nsa_launch(const NSADriver *driver, const NSALoaded *loaded, const NSAValue *values, const unsigned grid[3],
               nsa_stream_t stream, char *message) {
    const NSAKernel *kernel = loaded->kernel;
    /* Triton appends two pointers to scratch memory, of which the export allows none to be used. */
    NSAValue scratch = {0}, arguments[NSA_MAX_PARAMETERS];
    void *pointers[NSA_MAX_PARAMETERS + 2];
    const int count = kernel->num_parameters;
    for (int i = 0; i < count; i++) {
        arguments[i] = values[kernel->parameters[i].value];
        pointers[i] = &arguments[i];
    }
    pointers[count] = pointers[count + 1] = &scratch;
    const unsigned threads = 32u * (unsigned)kernel->num_warps, shared = (unsigned)kernel->shared;
    CUresult result;
    if (kernel->dependent && driver->launch_extended) {
        CUlaunchAttribute early = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                   .value = {.programmatic_stream_serialization = 1}};
        const CUlaunchConfig config = {grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, &early, 1};
        result = driver->launch_extended(&config, loaded->function, pointers, NULL);
    } else {
        result = driver->launch(loaded->function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, pointers, NULL);
    }
    return nsa_driver_check(driver, result, kernel->symbol, message);
}
