#ifndef NSA_CONFIG_H
#define NSA_CONFIG_H

#include "nsa/nsa.h"

/* Whether config can be; the message names the field, what it got and what it needs. */
int nsa_check_config(const NSAConfig *config, char *message);

/* Bytes of an element. */
int nsa_dtype_size(int dtype);

/* "fp32" */
const char *nsa_dtype_name(int dtype);

/* Compressed blocks that end within seq_len tokens. */
int nsa_num_compressed_blocks(const NSAConfig *config, int seq_len);

#endif
