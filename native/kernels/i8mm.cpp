#include "kernels/attention_driver.h"
#include "kernels/packed_product_driver.h"
#include "kernels/vector128.h"

namespace coreinfer {

namespace {

// The matrix instruction multiplies eight activations of two tokens with eight weights of two rows. One or two tokens
// go through as without it.
struct Vector : Vector128 {
    static constexpr bool kPairs = true;
    static constexpr int  kTile  = 16;

    template <int kTokens>
    static constexpr int kParts = kTokens == 1 ? 4 : 1;

    template <int kBits>
    static constexpr int kAtOnce = 4;

    template <class Any>
    static Any twice(Any x, bool upper) {
        const auto halves = reinterpret_cast<int64x2_t>(x);
        return reinterpret_cast<Any>(upper ? vdupq_laneq_s64(halves, 1) : vdupq_laneq_s64(halves, 0));
    }

    static void swap_halves(Float & first, Float & second) {
        const Float lower = vcombine_f32(vget_low_f32(first), vget_low_f32(second));
        second            = vcombine_f32(vget_high_f32(first), vget_high_f32(second));
        first             = lower;
    }

    // The numbers of two tokens, kStep apart, each in both lanes of a half.
    template <int kStep, class Any>
    static Any for_pair(Any x, bool second) {
        const auto y = reinterpret_cast<Int>(x);
        if constexpr (kStep == 1) {
            return reinterpret_cast<Any>(second ? vzip2q_s32(y, y) : vzip1q_s32(y, y));
        } else {
            return reinterpret_cast<Any>(second ? vtrn2q_s32(y, y) : vtrn1q_s32(y, y));
        }
    }

    template <int n, int kStep = 1, int kFactor = 1, class Number>
    static auto each(const Number * from) {
        if constexpr (!in_pairs(kPairs, n)) {
            return Vector128::each<n, kStep, kFactor>(from);
        } else {
            return [loaded = Loaded<n * kStep, kFactor, Number>(from)](int i, int k = 0) {
                const int at = i / 2 * 2 * kStep + k;
                return for_pair<kStep>(loaded.of[at / 4], at % 4 >= (kStep == 1 ? 2 : 1));
            };
        }
    }

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        if constexpr (!in_pairs(kPairs, kTokens)) {
            dots_of_four<kFirst, kLast>(sums, levels, x);
        } else {
            for (int j = kFirst; j < kLast; j += 2) {
                for (int p = 0; p < kParts; ++p) {
                    const auto lower = vreinterpretq_s8_s32(vzip1q_s32(levels[p][j], levels[p][j + 1]));
                    const auto upper = vreinterpretq_s8_s32(vzip2q_s32(levels[p][j], levels[p][j + 1]));
                    for (int t = 0; t < kTokens; t += 2) {
                        const int8x16_t both = vld1q_s8(x + 32 * t + 8 * j);
                        sums[p][t]           = vmmlaq_s32(sums[p][t], both, lower);
                        sums[p][t + 1]       = vmmlaq_s32(sums[p][t + 1], both, upper);
                    }
                }
            }
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_i8mm() {
    static const PackedKernels kernels = { "i8mm",           Vector::kByteOffset, Vector::kTile, Vector::kPairs,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
