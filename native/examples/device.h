/* As much of the CUDA driver as an example needs to bring tensors to a GPU and back, without CUDA's headers. A program that uses
 * the CUDA runtime passes what cudaMalloc returned instead. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 0, or what went wrong on stderr and 1. */
int device_open(void);

/* GPU memory that holds bytes of data, or NULL. */
void *device_upload(const void *data, size_t bytes);

/* Waits for the default stream. 0 or 1. */
int device_download(void *data, const void *memory, size_t bytes);

void device_free(void *memory);
void device_close(void);

#ifdef __cplusplus
}
#endif

#endif
