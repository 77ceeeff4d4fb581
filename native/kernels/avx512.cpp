#include "kernels/packed_product_driver.h"

#include <immintrin.h>

namespace coreinfer {

namespace {

struct Vector {
    static constexpr int kLanes = 16;
    using Int                   = __m512i;
    using Float                 = __m512;

    static Int load(const uint8_t * from) { return _mm512_loadu_si512(from); }

    static Int low(Int x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }

    static Int high(Int x) { return low(_mm512_srli_epi16(x, 4)); }

    static void add_fifth(Int bits, Int (&levels)[8]) {
        for (int j = 0; j < 8; ++j) {
            const Int at_4 = j < 4 ? _mm512_slli_epi16(bits, 4 - j) : _mm512_srli_epi16(bits, j - 4);
            // levels | (at_4 & 16)
            levels[j] = _mm512_ternarylogic_epi32(levels[j], at_4, _mm512_set1_epi8(16), 0xf8);
        }
    }

    static Int six_bits(Int x) { return _mm512_and_si512(x, _mm512_set1_epi8(63)); }

    // the upper two bits of each byte above the four of another
    static Int joined(Int four, Int upper) {
        return _mm512_or_si512(four, _mm512_and_si512(_mm512_srli_epi16(upper, 2), _mm512_set1_epi8(48)));
    }

    static Float byte(Int x, int i) {
        return to_float(_mm512_and_si512(_mm512_srl_epi32(x, _mm_cvtsi32_si128(8 * i)), _mm512_set1_epi32(255)));
    }

    static Int splat(int32_t x) { return _mm512_set1_epi32(x); }

    static Float splat(float x) { return _mm512_set1_ps(x); }

    static Float zero() { return _mm512_setzero_ps(); }

    static Int dot(Int sum, Int levels, Int x) { return _mm512_dpbusd_epi32(sum, levels, x); }

    static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }

    static Float half(const uint8_t * from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    }

    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }

    static Float fma(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }

    static void store(float * to, Float x) { _mm512_storeu_ps(to, x); }

    static void prefetch(const uint8_t * at) {
        for (int i = 0; i < 4; ++i) {
            _mm_prefetch(reinterpret_cast<const char *>(at) + 4096 + 64 * i, _MM_HINT_T0);
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_avx512() {
    static const PackedKernels kernels = { "avx512", true, 128, quantize, multiply<Vector> };
    return &kernels;
}

} // namespace coreinfer
