/* Two contexts, two streams, two threads: neither sees the other. */
#include <pthread.h>
#include <stdalign.h>

#include "check.h"
#include "fake.h"
#include "nsa/nsa.h"

enum { ROUNDS = 40 };

static alignas(64) char memory[64];

static void *work(void *stream) {
    long wrong = 0;
    for (int round = 0; round < ROUNDS; round++) {
        NSAConfig config = nsa_create_default_config(64, 8);
        NSAContext ctx;
        config.max_seq_len = 500;
        wrong += nsa_init(&ctx, &config) != NSA_OK;
        for (int t = 1; t <= 7; t++) {
            wrong += nsa_update_window(&ctx, memory, memory, 1, (nsa_stream_t)stream) != NSA_OK;
            wrong += nsa_compute_attention(&ctx, memory, memory, memory, t, memory, (nsa_stream_t)stream) != NSA_OK;
        }
        wrong += nsa_compute_attention(&ctx, memory, memory, memory, 501, memory, (nsa_stream_t)stream) == NSA_OK;
        wrong += nsa_free(&ctx) != NSA_OK;
    }
    return (void *)wrong;
}

int main(void) {
    const Fake *fake = open_fake();
    pthread_t threads[2];
    void *wrong;
    for (long i = 0; i < 2; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, work, (void *)(i + 1)), 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(pthread_join(threads[i], &wrong), 0);
        CHECK_EQUAL((long)wrong, 0);
    }
    int of_first = 0;
    for (int i = 0; i < fake->num_launches; i++)
        of_first += fake->launches[i].stream == (void *)1;
    CHECK_EQUAL(2 * of_first, fake->num_launches);
    CHECK_EQUAL(fake->num_launches, 2 * ROUNDS * 7 * 6);
    CHECK_EQUAL(fake->blocks, 0);
    CHECK_EQUAL(fake->modules, 0);
    CHECK_EQUAL(fake->retained, 0);
    return failures != 0;
}
