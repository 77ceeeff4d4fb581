#pragma once

// What packed_product_driver.h needs of vectors of 256 bits, but for the dot product.

#include "kernels/exponential.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

struct Vector256 {
    static constexpr bool kMultipliesIntegers = false;
    static constexpr bool kPairs              = false;
    static constexpr int  kLanes              = 8;
    static constexpr int  kRegisters          = 16;
    using Int                                 = __m256i;
    using Float                               = __m256;
    using Factor                              = Float;

    template <int kTokens>
    static constexpr int kParts = 16 / kLanes;

    static Int load(const uint8_t * from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }

    static Int low(Int x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }

    static Int high(Int x) { return low(_mm256_srli_epi16(x, 4)); }

    static void add_fifth(Int bits, Int * levels) {
        for (int j = 0; j < 8; ++j) {
            const Int at_4 = j < 4 ? _mm256_slli_epi16(bits, 4 - j) : _mm256_srli_epi16(bits, j - 4);
            levels[j]      = _mm256_or_si256(levels[j], _mm256_and_si256(at_4, _mm256_set1_epi8(16)));
        }
    }

    static void two_bits(Int x, Int * levels) {
        for (int j = 0; j < 4; ++j) {
            levels[j] = _mm256_and_si256(_mm256_srli_epi16(x, 2 * j), _mm256_set1_epi8(3));
        }
    }

    static void add_third(Int bits, Int * levels) {
        for (int j = 0; j < 8; ++j) {
            const Int at_2 = j < 2 ? _mm256_slli_epi16(bits, 2 - j) : _mm256_srli_epi16(bits, j - 2);
            levels[j]      = _mm256_or_si256(levels[j], _mm256_and_si256(at_2, _mm256_set1_epi8(4)));
        }
    }

    static void add_two(Int bits, Int * levels) {
        for (int j = 0; j < 4; ++j) {
            const Int at_4 = j < 2 ? _mm256_slli_epi16(bits, 4 - 2 * j) : _mm256_srli_epi16(bits, 2 * j - 4);
            levels[j]      = _mm256_or_si256(levels[j], _mm256_and_si256(at_4, _mm256_set1_epi8(48)));
        }
    }

    // table: the values plus kByteOffset
    static Int look_up(const uint8_t * table, Int levels) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), levels);
    }

    static Int six_bits(Int x) { return _mm256_and_si256(x, _mm256_set1_epi8(63)); }

    // the upper two bits of each byte above the four of another
    static Int joined(Int four, Int upper) {
        return _mm256_or_si256(four, _mm256_and_si256(_mm256_srli_epi16(upper, 2), _mm256_set1_epi8(48)));
    }

    static Float bits(Int x, int shift, int mask) {
        return to_float(_mm256_and_si256(_mm256_srl_epi32(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(mask)));
    }

    static Float signed_byte(Int x, int i) {
        return to_float(_mm256_srai_epi32(_mm256_sll_epi32(x, _mm_cvtsi32_si128(24 - 8 * i)), 24));
    }

    static Int splat(int32_t x) { return _mm256_set1_epi32(x); }

    static Float splat(float x) { return _mm256_set1_ps(x); }

    template <int n, int kStep = 1, int kFactor = 1, class Number>
    static auto each(const Number * from) {
        return [from](int i, int k = 0) { return splat(kFactor * from[kStep * i + k]); };
    }

    // four activations in every lane
    static Int splat_four(const int8_t * x) {
        int32_t four;
        std::memcpy(&four, x, sizeof(four));
        return splat(four);
    }

    // of 16 bits each
    static Int add_words(Int a, Int b) { return _mm256_add_epi16(a, b); }

    // the sums of two words beside each other, added to each lane
    static Int add_pairs(Int sum, Int words) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }

    static void compute_now(Int & x) { __asm__ volatile("" : "+x"(x)); }

    static Float zero() { return _mm256_setzero_ps(); }

    static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }

    static Float half(const uint8_t * from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }

    static Int load_words(const uint8_t * from) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    }

    static Float load_floats(const float * from) { return _mm256_loadu_ps(from); }

    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }

    static Float fma(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }

    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }

    static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }

    static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }

    static Float sums(const Float * x) {
        Float four[2]; // each half has what is in it of four vectors
        for (int i = 0; i < 2; ++i) {
            const Float a = _mm256_hadd_ps(x[4 * i], x[4 * i + 1]);
            const Float b = _mm256_hadd_ps(x[4 * i + 2], x[4 * i + 3]);
            four[i]       = _mm256_hadd_ps(a, b);
        }
        return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                             _mm256_permute2f128_ps(four[0], four[1], 0x31));
    }

    static Float exponential(Float x) {
        const Float at_least = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);
        const Float n        = _mm256_round_ps(_mm256_mul_ps(at_least, _mm256_set1_ps(0x1.715476p+0f)),
                                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const Float y        = exponential_of_rest<Vector256>(at_least, n);
        const Int   scale    = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        const Float is_none  = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ);
        return _mm256_andnot_ps(is_none, _mm256_mul_ps(y, _mm256_castsi256_ps(scale)));
    }

    static void store(float * to, Float x) { _mm256_storeu_ps(to, x); }

    static void prefetch(const uint8_t * at, int64_t size) {
        for (int64_t i = 0; i < size; i += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(at) + i, _MM_HINT_T0);
        }
    }
};

} // namespace
} // namespace coreinfer
