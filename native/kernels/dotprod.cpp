#include "kernels/attention_driver.h"
#include "kernels/packed_product_driver.h"
#include "kernels/vector128.h"

namespace coreinfer {

namespace {

struct Vector : Vector128 {
    static constexpr int kTile = 8;

    template <int kTokens>
    static constexpr int kParts = kTokens == 1 ? 4 : 1;

    template <int kBits>
    static constexpr int kAtOnce = 8;

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
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
};

} // namespace

const PackedKernels * packed_kernels_dotprod() {
    static const PackedKernels kernels = { "dotprod",        Vector::kByteOffset, Vector::kTile,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
