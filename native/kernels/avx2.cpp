#include "kernels/packed_product_driver.h"
#include "kernels/vector256.h"

namespace coreinfer {

namespace {

struct Vector : Vector256 {
    static constexpr int kTile       = 16;
    static constexpr int kByteOffset = 0;

    template <int kBits>
    static constexpr int kAtOnce = kBits == 8 ? 4 : 2;

    // Sums of two products have 16 bits. For 8 bits the signs of the levels go to the activations: 2 * 128 * 127 fits.
    template <int kBits>
    static Int two_products(Int levels, Int x) {
        if constexpr (kBits == 8) {
            return _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(x, levels));
        } else {
            return _mm256_maddubs_epi16(levels, x);
        }
    }

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        // as many sums of two products, at most 127 times the largest level each, as 16 bits hold
        constexpr int kFit  = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
        constexpr int kStep = kFit < kLast - kFirst ? kFit : kLast - kFirst;
        for (int j = kFirst; j < kLast; j += kStep) {
            Int words[kParts][kTokens];
            for (auto & part : words) {
                for (Int & sum : part) {
                    sum = splat(0);
                }
            }
            for (int k = j; k < j + kStep; ++k) {
                for (int t = 0; t < kTokens; ++t) {
                    const Int four = splat_four(x + 32 * t + 4 * k);
                    for (int p = 0; p < kParts; ++p) {
                        const Int two = two_products<kBits>(levels[p][k], four);
                        words[p][t]   = _mm256_add_epi16(words[p][t], two);
                        // gcc would go through one token after the other, with more than fits in registers
                        __asm__ volatile("" : "+x"(words[p][t]));
                    }
                }
            }
            for (int t = 0; t < kTokens; ++t) {
                for (int p = 0; p < kParts; ++p) {
                    const Int four_products = _mm256_madd_epi16(words[p][t], _mm256_set1_epi16(1));
                    sums[p][t]              = _mm256_add_epi32(sums[p][t], four_products);
                }
            }
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_avx2() {
    static const PackedKernels kernels = { "avx2", Vector::kByteOffset, Vector::kTile, quantize<Vector>,
                                           multiply<Vector> };
    return &kernels;
}

} // namespace coreinfer
