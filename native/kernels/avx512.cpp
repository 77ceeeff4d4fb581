#include "kernels/attention_driver.h"
#include "kernels/dots.h"
#include "kernels/packed_product_driver.h"
#include "kernels/vector512.h"

namespace coreinfer {

namespace {

struct Vector : Vector512 {
    static constexpr int kTile       = 16;
    static constexpr int kByteOffset = 0;

    template <int kBits>
    static constexpr int kAtOnce = 2;

    // Sums of two products have 16 bits. For 8 bits the signs of the levels go to the activations: 2 * 128 * 127 fits.
    template <int kBits>
    static Int two_products(Int levels, Int x) {
        if constexpr (kBits == 8) {
            return _mm512_maddubs_epi16(_mm512_abs_epi8(levels), _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(levels),
                                                                                      _mm512_setzero_si512(), x));
        } else {
            return _mm512_maddubs_epi16(levels, x);
        }
    }

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        dots_of_two<Vector, kBits, kFirst, kLast>(sums, levels, x);
    }
};

} // namespace

const PackedKernels * packed_kernels_avx512() {
    static const PackedKernels kernels = { "avx512",         Vector::kByteOffset, Vector::kTile, Vector::kPairs,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
