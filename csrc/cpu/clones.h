// CLONES compiles a function for three instruction sets, chosen when the module is loaded; elsewhere there is one
// plain build. Results are the same bits: no contraction, no reassociation, and a number of lanes that does not depend
// on the vector width.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) && !defined(LAYERFUSED_NO_CLONES)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
