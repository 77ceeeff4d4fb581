#include "kernels/attention_driver.h"
#include "kernels/packed_product_driver.h"
#include "kernels/vector128.h"

namespace coreinfer {

namespace {

struct Vector : Vector128 {
    static constexpr int kTile = 4;

    template <int kTokens>
    static constexpr int kParts = kTokens == 1 ? 4 : 2;

    template <int kBits>
    static constexpr int kAtOnce = 2;

    // Products have 16 bits: those of the lower half of the lanes in one vector, those of the upper half in another.
    // Four products of a lane stay beside each other until as many are summed as 16 bits hold, at most 127 times the
    // largest level each.
    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        constexpr int kFit  = kBits <= 5 ? 8 : kBits == 6 ? 4 : 2;
        constexpr int kStep = kFit < kLast - kFirst ? kFit : kLast - kFirst;
        for (int t = 0; t < kTokens; ++t) {
            int32x4_t sixteen;
            int16x8_t lower[kParts], upper[kParts];
#pragma GCC unroll 8
            for (int j = kFirst; j < kLast; j += kStep) {
#pragma GCC unroll 8
                for (int k = j; k < j + kStep; ++k) {
                    if (k % 4 == 0) {
                        sixteen = vreinterpretq_s32_s8(vld1q_s8(x + 32 * t + 4 * k));
                        __asm__("" : "+w"(sixteen)); // gcc would load each four alone
                    }
                    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(sixteen[k % 4]));
#pragma GCC unroll 4
                    for (int p = 0; p < kParts; ++p) {
                        const int8x16_t level = vreinterpretq_s8_s32(levels[p][k]);
                        const int8x8_t  low   = vget_low_s8(level);
                        if (k == j) {
                            lower[p] = vmull_s8(low, vget_low_s8(four));
                            upper[p] = vmull_high_s8(level, four);
                        } else {
                            lower[p] = vmlal_s8(lower[p], low, vget_low_s8(four));
                            upper[p] = vmlal_high_s8(upper[p], level, four);
                        }
                    }
                }
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p) {
                    if constexpr (kBits == 4) { // two sums fit too
                        sums[p][t] = vpadalq_s16(sums[p][t], vpaddq_s16(lower[p], upper[p]));
                    } else {
                        const Int both = vpaddq_s32(vpaddlq_s16(lower[p]), vpaddlq_s16(upper[p]));
                        sums[p][t]     = vaddq_s32(sums[p][t], both);
                    }
                    if constexpr (kTokens > 1) {
                        // gcc would go through all tokens at once, with more than fits in registers
                        __asm__ volatile("" : "+w"(sums[p][t]));
                    }
                }
            }
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_neon() {
    static const PackedKernels kernels = { "neon",           Vector::kByteOffset, Vector::kTile, Vector::kPairs,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
