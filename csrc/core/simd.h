// EPMOE_SIMD: compile a loop once for each vector width and let the loader choose by the machine.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define EPMOE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EPMOE_SIMD
#endif
