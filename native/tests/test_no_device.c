/* A machine without a driver: NSA_CUDA_DRIVER names a file that is not there. */
#include "check.h"
#include "nsa/nsa.h"

int main(void) {
    const NSAConfig config = nsa_create_default_config(64, 8);
    NSAContext ctx;
    size_t bytes = 0;
    memset(&ctx, 0x5a, sizeof ctx); /* as a struct that nobody initialised */
    CHECK_EQUAL(nsa_init(&ctx, &config), NSA_ERROR_NO_DEVICE);
    CHECK_TEXT(nsa_last_error(&ctx), "no NVIDIA driver on this machine: ");
    CHECK_EQUAL(nsa_reset(&ctx), NSA_ERROR_INVALID_ARGUMENT);
    CHECK_TEXT(nsa_last_error(&ctx), "ctx was freed, or nsa_init did not succeed");
    CHECK_EQUAL(nsa_free(&ctx), NSA_OK);
    CHECK_EQUAL(nsa_free(&ctx), NSA_OK);
    /* The workspace's size needs no device. */
    CHECK_EQUAL(nsa_workspace_size(&ctx, &config, &bytes), NSA_OK);
    CHECK(bytes > 1 << 20);
    return failures != 0;
}
