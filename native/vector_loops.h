#pragma once

#include <cstdint>
#include <cstring>

// Loops over weights and activations are plain, and the compiler turns them into vector code. A function marked CLONES
// is also compiled for newer processors, and the right version is taken at run time: a portable build is as fast as a
// native one. Sanitisers are not ready when the version is chosen, so with them there is one version.
#if !defined(__x86_64__) || !defined(__GLIBC__) || defined(__clang__) || defined(__SANITIZE_ADDRESS__)
#    define CLONES
#elif __GNUC__ >= 12
#    define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#    define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

#if defined(_MSC_VER)
#    define RESTRICT __restrict
#    define ALWAYS_INLINE __forceinline
#    define NOINLINE __declspec(noinline)
#else
#    define RESTRICT __restrict__
#    define ALWAYS_INLINE __attribute__((always_inline))
#    define NOINLINE __attribute__((noinline))
#endif

namespace coreinfer {

// The nearest integer. Adding 1.5 * 2^23 leaves it in the lowest bits.
static inline int32_t nearest(float x) {
    const float shifted = x + 12582912.0f;
    int32_t     bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    return (bits & 0x007fffff) - 0x00400000;
}

} // namespace coreinfer
