#pragma once

// The instructions that an x86 processor has, and whose registers the system saves. The compiler's own
// __builtin_cpu_supports() finds none of them in what zig compiles.

#include <cpuid.h>

namespace coreinfer {

struct X86Features {
    bool avx2       = false; // with FMA and F16C
    bool avx512     = false; // F and BW, with AVX2
    bool avx512vnni = false;
    bool avxvnni    = false;

    X86Features() {
        const auto bit = [](unsigned word, int i) { return (word >> i & 1) != 0; };
        unsigned   a = 0, b = 0, c = 0, d = 0;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) {
            return; // the system saves no registers of AVX
        }
        const bool fma = bit(c, 12) && bit(c, 28) && bit(c, 29);
        unsigned   saved, high;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
            return;
        }
        avx2       = fma && bit(b, 5) && (saved & 0x06) == 0x06;
        avx512     = avx2 && bit(b, 16) && bit(b, 30) && (saved & 0xe6) == 0xe6;
        avx512vnni = avx512 && bit(c, 11);
        avxvnni    = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && avx2 && bit(a, 4);
    }
};

} // namespace coreinfer
