/* All that follows from a configuration and a GPU before anything runs: which kernels, how many programs of each, where in the
 * workspace everything lies. The twin of nsa/decode_tuning.py and nsa/kernels/triton/decode.py. */
#ifndef NSA_PLAN_H
#define NSA_PLAN_H

#include <stddef.h>

#include "kernel.h"

#define NSA_MAX_AGAIN 8 /* launches that choose among chosen blocks; each leaves an eighth or less */

typedef enum NSASlot {
    NSA_SLOT_BEGIN,
    NSA_SLOT_LINEAR_KEYS,
    NSA_SLOT_LINEAR_VALUES,
    NSA_SLOT_MLP_KEYS,
    NSA_SLOT_MLP_VALUES,
    NSA_SLOT_WINDOW,
    NSA_SLOT_COMPRESSED,
    NSA_SLOT_CHOOSE,
    NSA_SLOT_TOKENS,
    NSA_SLOT_MERGE,
    NSA_SLOT_AGAIN, /* and those behind it, as far as again counts */
    NSA_NUM_SLOTS = NSA_SLOT_AGAIN + NSA_MAX_AGAIN
} NSASlot;

typedef struct NSAPlan {
    const NSAKernel *kernels[NSA_NUM_SLOTS];
    unsigned grids[NSA_NUM_SLOTS][3]; /* of the kernels whose grid depends on no length */
    int again;                        /* launches of decode_choose_again */
    int counts[NSA_MAX_AGAIN];        /* blocks that each chooses from, of a KV head */
    NSAValue values[NSA_NUM_VALUES];  /* numbers that no call changes */
    size_t offsets[NSA_NUM_VALUES];   /* of the workspace's tensors */
    size_t other_chosen;              /* of the second buffer of chosen blocks */
    size_t bytes;                     /* of the workspace */
} NSAPlan;

/* For a valid config. arch as in 90; 0 for whichever was exported first, since the workspace is the same for all. */
int nsa_make_plan(const NSAConfig *config, int arch, const NSAKernel *kernels, int num_kernels, NSAPlan *plan, char *message);

#endif
