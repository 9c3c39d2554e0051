#include "layout.h"

#define CHECK_OFFSET(type, field, offset) _Static_assert(offsetof(type, field) == offset, #type "." #field);
NSA_LAYOUT(CHECK_OFFSET)
_Static_assert(sizeof(NSAConfig) == 72, "NSAConfig");
_Static_assert(sizeof(NSAContext) == 16 + NSA_ERROR_LENGTH, "NSAContext");
_Static_assert(sizeof(NSACompressionWeights) == 32, "NSACompressionWeights");

int main(void) { return 0; }
