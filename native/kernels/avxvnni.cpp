#include "kernels/attention_driver.h"
#include "kernels/dots.h"
#include "kernels/packed_product_driver.h"
#include "kernels/vector256.h"

namespace coreinfer {

namespace {

struct Vector : Vector256 {
    static constexpr int kTile       = 8;
    static constexpr int kByteOffset = 128;

    template <int kBits>
    static constexpr int kAtOnce = 4;

    static Int dot(Int sum, Int levels, Int x) { return _mm256_dpbusd_avx_epi32(sum, levels, x); }

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        dots_of_four<Vector, kFirst, kLast>(sums, levels, x);
    }
};

} // namespace

const PackedKernels * packed_kernels_avxvnni() {
    static const PackedKernels kernels = { "avxvnni",        Vector::kByteOffset, Vector::kTile, Vector::kPairs,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
