#include "kernels/attention_driver.h"
#include "kernels/dots.h"
#include "kernels/packed_product_driver.h"
#include "kernels/vector512.h"

namespace coreinfer {

namespace {

struct Vector : Vector512 {
    static constexpr int kTile       = 16;
    static constexpr int kByteOffset = 128;

    template <int kBits>
    static constexpr int kAtOnce = 4;

    static Int dot(Int sum, Int levels, Int x) { return _mm512_dpbusd_epi32(sum, levels, x); }

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        dots_of_four<Vector, kFirst, kLast>(sums, levels, x);
    }
};

} // namespace

const PackedKernels * packed_kernels_avx512vnni() {
    static const PackedKernels kernels = { "avx512vnni",     Vector::kByteOffset, Vector::kTile, Vector::kPairs,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
