#pragma once

// What packed_product_driver.h needs of NEON's vectors of 128 bits, but for dots().

#include "kernels/exponential.h"

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

struct Vector128 {
    static constexpr bool kMultipliesIntegers = true;
    static constexpr bool kPairs              = false;
    static constexpr int  kLanes              = 4;
    static constexpr int  kRegisters          = 32;
    static constexpr int  kByteOffset         = 0; // products are of signed bytes
    using Int                                 = int32x4_t;
    using Float                               = float32x4_t;
    using Factor                              = Int;

    static uint8x16_t bytes(Int x) { return vreinterpretq_u8_s32(x); }

    static Int of(uint8x16_t x) { return vreinterpretq_s32_u8(x); }

    static Int load(const uint8_t * from) { return of(vld1q_u8(from)); }

    static Int low(Int x) { return of(vandq_u8(bytes(x), vdupq_n_u8(15))); }

    static Int high(Int x) { return of(vshrq_n_u8(bytes(x), 4)); }

    // Bit (or bits) j of each byte, kBits wide, to bit kTo; what else is in the byte is not cleared.
    static uint8x16_t moved(uint8x16_t x, int from, int to) { return from < to ? x << (to - from) : x >> (from - to); }

    // x with the bits of the mask from another
    static Int with(Int x, uint8x16_t other, uint8_t mask) { return of(vbslq_u8(vdupq_n_u8(mask), other, bytes(x))); }

    static void add_fifth(Int bits, Int * levels) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            levels[j] = with(levels[j], moved(bytes(bits), j, 4), 16);
        }
    }

    static void two_bits(Int x, Int * levels) {
        levels[0] = of(vandq_u8(bytes(x), vdupq_n_u8(3)));
        levels[1] = of(vandq_u8(vshrq_n_u8(bytes(x), 2), vdupq_n_u8(3)));
        levels[2] = of(vandq_u8(vshrq_n_u8(bytes(x), 4), vdupq_n_u8(3)));
        levels[3] = of(vshrq_n_u8(bytes(x), 6));
    }

    static void add_third(Int bits, Int * levels) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            levels[j] = with(levels[j], moved(bytes(bits), j, 2), 4);
        }
    }

    static void add_two(Int bits, Int * levels) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            levels[j] = with(levels[j], moved(bytes(bits), 2 * j, 4), 48);
        }
    }

    static Int look_up(const uint8_t * table, Int levels) { return of(vqtbl1q_u8(vld1q_u8(table), bytes(levels))); }

    static Int six_bits(Int x) { return of(vandq_u8(bytes(x), vdupq_n_u8(63))); }

    // the upper two bits of each byte above the four of another
    static Int joined(Int four, Int upper) { return with(four, vshrq_n_u8(bytes(upper), 2), 48); }

    static Int field(Int x, int shift, int mask) {
        const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-shift));
        return vandq_s32(vreinterpretq_s32_u32(shifted), vdupq_n_s32(mask));
    }

    static Float bits(Int x, int shift, int mask) { return to_float(field(x, shift, mask)); }

    static Float signed_byte(Int x, int i) { return to_float(vshrq_n_s32(vshlq_s32(x, vdupq_n_s32(24 - 8 * i)), 24)); }

    static Int splat(int32_t x) { return vdupq_n_s32(x); }

    static Float splat(float x) { return vdupq_n_f32(x); }

    static Int load_some(const int32_t * from, int n) {
        return n == 1 ? vld1q_dup_s32(from) : n == 2 ? vcombine_s32(vld1_s32(from), vdup_n_s32(0)) : vld1q_s32(from);
    }

    static Float load_some(const float * from, int n) {
        return n == 1 ? vld1q_dup_f32(from) : n == 2 ? vcombine_f32(vld1_f32(from), vdup_n_f32(0)) : vld1q_f32(from);
    }

    // n numbers for each lane, loaded together
    template <int n, int kFactor, class Number>
    struct Loaded {
        decltype(load_some(static_cast<const Number *>(nullptr), n)) of[(n + 3) / 4];

        explicit Loaded(const Number * from) {
            for (int i = 0; i < n; i += 4) {
                of[i / 4] = load_some(from + i, n) * kFactor;
            }
        }
    };

    template <int n, int kStep = 1, int kFactor = 1, class Number>
    static auto each(const Number * from) {
        constexpr int kAll = n * kStep;
        return [loaded = Loaded<kAll, kFactor, Number>(from)](int i, int k = 0) {
            const int at = kStep * i + k;
            return kAll == 1 ? loaded.of[0] : splat(loaded.of[at / 4][at % 4]);
        };
    }

#ifdef __ARM_FEATURE_DOTPROD
    // dots() of packed_product_driver.h, four levels and activations of each lane at a time
    template <int kFirst, int kLast, int kTokens, int kParts>
    static void dots_of_four(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        for (int t = 0; t < kTokens; ++t) {
            for (int j = kFirst; j < kLast; j += 4) {
                const int8x16_t four = vld1q_s8(x + 32 * t + 4 * j);
                for (int p = 0; p < kParts; ++p) {
                    const Int * level = levels[p] + j;
                    Int &       sum   = sums[p][t];
                    sum               = vdotq_laneq_s32(sum, vreinterpretq_s8_s32(level[0]), four, 0);
                    sum               = vdotq_laneq_s32(sum, vreinterpretq_s8_s32(level[1]), four, 1);
                    sum               = vdotq_laneq_s32(sum, vreinterpretq_s8_s32(level[2]), four, 2);
                    sum               = vdotq_laneq_s32(sum, vreinterpretq_s8_s32(level[3]), four, 3);
                }
            }
        }
    }
#endif

    static Float zero() { return vdupq_n_f32(0.0f); }

    static Float to_float(Int x) { return vcvtq_f32_s32(x); }

    static Float half(const uint8_t * from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }

    static Int load_words(const uint8_t * from) {
        return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(from))));
    }

    static Float load_floats(const float * from) { return vld1q_f32(from); }

    static Float mul(Float a, Float b) { return vmulq_f32(a, b); }

    static Int mul(Int a, Int b) { return vmulq_s32(a, b); }

    static Int add_product(Int sum, Int a, Int b) { return vmlaq_s32(sum, a, b); }

    static Float fma(Float a, Float b, Float sum) { return vfmaq_f32(sum, a, b); }

    static Float add(Float a, Float b) { return vaddq_f32(a, b); }

    static Float subtract(Float a, Float b) { return vsubq_f32(a, b); }

    static Float max(Float a, Float b) { return vmaxq_f32(a, b); }

    static Float sums(const Float * x) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }

    static Float exponential(Float x) {
        const Float at_least = vmaxq_f32(vdupq_n_f32(-87.0f), x);
        const Float n        = vrndnq_f32(vmulq_f32(at_least, vdupq_n_f32(0x1.715476p+0f)));
        const Float y        = exponential_of_rest<Vector128>(at_least, n);
        const Int   scale    = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
        const auto  is_some  = vcgeq_f32(x, vdupq_n_f32(-87.0f));
        return vreinterpretq_f32_u32(
            vandq_u32(is_some, vreinterpretq_u32_f32(vmulq_f32(y, vreinterpretq_f32_s32(scale)))));
    }

    static void store(float * to, Float x) { vst1q_f32(to, x); }

    static void prefetch(const uint8_t * at, int64_t size) {
        for (int64_t i = 0; i < size; i += 64) {
            __builtin_prefetch(at + i);
        }
    }
};

} // namespace
} // namespace coreinfer
