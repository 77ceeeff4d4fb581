#pragma once

// What packed_product_driver.h needs of vectors of 512 bits, but for the dot product.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

struct Vector512 {
    static constexpr int kLanes = 16;
    using Int                   = __m512i;
    using Float                 = __m512;

    static Int load(const uint8_t * from) { return _mm512_loadu_si512(from); }

    static Int low(Int x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }

    static Int high(Int x) { return low(_mm512_srli_epi16(x, 4)); }

    static void add_fifth(Int bits, Int * levels) {
        for (int j = 0; j < 8; ++j) {
            const Int at_4 = j < 4 ? _mm512_slli_epi16(bits, 4 - j) : _mm512_srli_epi16(bits, j - 4);
            // levels | (at_4 & mask)
            levels[j] = _mm512_ternarylogic_epi32(levels[j], at_4, _mm512_set1_epi8(16), 0xf8);
        }
    }

    static void two_bits(Int x, Int * levels) {
        for (int j = 0; j < 4; ++j) {
            levels[j] = _mm512_and_si512(_mm512_srli_epi16(x, 2 * j), _mm512_set1_epi8(3));
        }
    }

    static void add_third(Int bits, Int * levels) {
        for (int j = 0; j < 8; ++j) {
            const Int at_2 = j < 2 ? _mm512_slli_epi16(bits, 2 - j) : _mm512_srli_epi16(bits, j - 2);
            // levels | (at_2 & mask)
            levels[j] = _mm512_ternarylogic_epi32(levels[j], at_2, _mm512_set1_epi8(4), 0xf8);
        }
    }

    static void add_two(Int bits, Int * levels) {
        for (int j = 0; j < 4; ++j) {
            const Int at_4 = j < 2 ? _mm512_slli_epi16(bits, 4 - 2 * j) : _mm512_srli_epi16(bits, 2 * j - 4);
            // levels | (at_4 & mask)
            levels[j] = _mm512_ternarylogic_epi32(levels[j], at_4, _mm512_set1_epi8(48), 0xf8);
        }
    }

    // table: the values plus kByteOffset
    static Int look_up(const uint8_t * table, Int levels) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), levels);
    }

    static Int six_bits(Int x) { return _mm512_and_si512(x, _mm512_set1_epi8(63)); }

    // the upper two bits of each byte above the four of another
    static Int joined(Int four, Int upper) {
        return _mm512_or_si512(four, _mm512_and_si512(_mm512_srli_epi16(upper, 2), _mm512_set1_epi8(48)));
    }

    static Float bits(Int x, int shift, int mask) {
        return to_float(_mm512_and_si512(_mm512_srl_epi32(x, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(mask)));
    }

    static Float signed_byte(Int x, int i) {
        return to_float(_mm512_srai_epi32(_mm512_sll_epi32(x, _mm_cvtsi32_si128(24 - 8 * i)), 24));
    }

    static Int splat(int32_t x) { return _mm512_set1_epi32(x); }

    static Float splat(float x) { return _mm512_set1_ps(x); }

    // four activations in every lane
    static Int splat_four(const int8_t * x) {
        int32_t four;
        std::memcpy(&four, x, sizeof(four));
        return splat(four);
    }

    // of 16 bits each
    static Int add_words(Int a, Int b) { return _mm512_add_epi16(a, b); }

    // the sums of two words beside each other, added to each lane
    static Int add_pairs(Int sum, Int words) {
        return _mm512_add_epi32(sum, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
    }

    static void compute_now(Int & x) { __asm__ volatile("" : "+v"(x)); }

    static Float zero() { return _mm512_setzero_ps(); }

    static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }

    static Float half(const uint8_t * from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    }

    static Int load_words(const uint8_t * from) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    }

    static Float load_floats(const float * from) { return _mm512_loadu_ps(from); }

    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }

    static Float fma(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }

    static void store(float * to, Float x) { _mm512_storeu_ps(to, x); }

    static void prefetch(const uint8_t * at, int64_t size) {
        for (int64_t i = 0; i < size; i += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(at) + i, _MM_HINT_T0);
        }
    }
};

} // namespace
} // namespace coreinfer
