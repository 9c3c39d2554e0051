/* Checks that say where and what, and count. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <string.h>

static int failures;

#define CHECK(condition)                                                                                                       \
    do {                                                                                                                       \
        if (!(condition)) {                                                                                                    \
            failures++;                                                                                                        \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                                      \
        }                                                                                                                      \
    } while (0)

#define CHECK_EQUAL(got, want)                                                                                                 \
    do {                                                                                                                       \
        const long long got_ = (long long)(got), want_ = (long long)(want);                                                    \
        if (got_ != want_) {                                                                                                   \
            failures++;                                                                                                        \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #got, got_, want_);                           \
        }                                                                                                                      \
    } while (0)

#define CHECK_TEXT(got, part)                                                                                                  \
    do {                                                                                                                       \
        const char *text_ = (got);                                                                                             \
        if (!strstr(text_, (part))) {                                                                                          \
            failures++;                                                                                                        \
            fprintf(stderr, "%s:%d: \"%s\" lacks \"%s\"\n", __FILE__, __LINE__, text_, (part));                                \
        }                                                                                                                      \
    } while (0)

#endif
