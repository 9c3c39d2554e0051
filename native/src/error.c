#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#define TEXT(x) #x
#define VERSION(major, minor, patch) TEXT(major) "." TEXT(minor) "." TEXT(patch)

int nsa_fail(char *message, int error, const char *format, ...) {
    if (message) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message, NSA_ERROR_LENGTH, format, arguments);
        va_end(arguments);
    }
    return error;
}

const char *nsa_version(void) { return VERSION(NSA_VERSION_MAJOR, NSA_VERSION_MINOR, NSA_VERSION_PATCH); }

const char *nsa_error_name(int error) {
    switch (error) {
    case NSA_OK: return "NSA_OK";
    case NSA_ERROR_INVALID_ARGUMENT: return "NSA_ERROR_INVALID_ARGUMENT";
    case NSA_ERROR_NO_DEVICE: return "NSA_ERROR_NO_DEVICE";
    case NSA_ERROR_NOT_EXPORTED: return "NSA_ERROR_NOT_EXPORTED";
    case NSA_ERROR_OUT_OF_MEMORY: return "NSA_ERROR_OUT_OF_MEMORY";
    case NSA_ERROR_CUDA: return "NSA_ERROR_CUDA";
    default: return "not an NSAError";
    }
}
