// The header in C++, and that a C++ caller sees the layout that the library was compiled with.
#include "layout.h"

#define CHECK_OFFSET(type, field, offset) static_assert(offsetof(type, field) == offset, #type "." #field);
NSA_LAYOUT(CHECK_OFFSET)
static_assert(sizeof(NSAConfig) == 72, "NSAConfig");
static_assert(sizeof(NSAContext) == 16 + NSA_ERROR_LENGTH, "NSAContext");

int main() { return nsa_create_default_config(64, 8).struct_size == sizeof(NSAConfig) ? 0 : 1; }
