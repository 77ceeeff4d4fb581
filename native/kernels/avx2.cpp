#include "kernels/packed_product_driver.h"

#include <immintrin.h>

namespace coreinfer {

namespace {

struct Vector {
    static constexpr int kLanes = 8;
    using Int                   = __m256i;
    using Float                 = __m256;

    static Int load(const uint8_t * from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }

    static Int low(Int x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }

    static Int high(Int x) { return low(_mm256_srli_epi16(x, 4)); }

    static void add_fifth(Int bits, Int (&levels)[8]) {
        for (int j = 0; j < 8; ++j) {
            const Int at_4 = j < 4 ? _mm256_slli_epi16(bits, 4 - j) : _mm256_srli_epi16(bits, j - 4);
            levels[j]      = _mm256_or_si256(levels[j], _mm256_and_si256(at_4, _mm256_set1_epi8(16)));
        }
    }

    static Int six_bits(Int x) { return _mm256_and_si256(x, _mm256_set1_epi8(63)); }

    static Int joined(Int four, Int upper) {
        return _mm256_or_si256(four, _mm256_and_si256(_mm256_srli_epi16(upper, 2), _mm256_set1_epi8(48)));
    }

    static Float byte(Int x, int i) {
        return to_float(_mm256_and_si256(_mm256_srl_epi32(x, _mm_cvtsi32_si128(8 * i)), _mm256_set1_epi32(255)));
    }

    static Int splat(int32_t x) { return _mm256_set1_epi32(x); }

    static Float splat(float x) { return _mm256_set1_ps(x); }

    static Float zero() { return _mm256_setzero_ps(); }

    // The sum of two products has 16 bits: enough for levels of 5 bits, not for those of 8.
    static Int dot(Int sum, Int levels, Int x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(levels, x), _mm256_set1_epi16(1)));
    }

    static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }

    static Float half(const uint8_t * from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }

    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }

    static Float fma(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }

    static void store(float * to, Float x) { _mm256_storeu_ps(to, x); }

    static void prefetch(const uint8_t * at) {
        for (int i = 0; i < 4; ++i) {
            _mm_prefetch(reinterpret_cast<const char *>(at) + 4096 + 64 * i, _MM_HINT_T0);
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_avx2() {
    static const PackedKernels kernels = { "avx2", false, 128, quantize, multiply<Vector> };
    return &kernels;
}

} // namespace coreinfer
