/* Messages: every internal function that can fail takes the buffer that nsa_last_error shows, and returns an NSAError. */
#ifndef NSA_ERROR_H
#define NSA_ERROR_H

#include "nsa/nsa.h"

#if defined(__GNUC__)
#define NSA_FORMATTED __attribute__((format(printf, 3, 4)))
#else
#define NSA_FORMATTED
#endif

/* Write the message, unless there is nowhere to, and return error. */
int nsa_fail(char *message, int error, const char *format, ...) NSA_FORMATTED;

#endif
