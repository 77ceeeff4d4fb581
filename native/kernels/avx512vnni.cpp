#include "kernels/packed_product_driver.h"
#include "kernels/vector512.h"

namespace coreinfer {

namespace {

struct Vector : Vector512 {
    static constexpr int kTile       = 16;
    static constexpr int kByteOffset = 128;

    template <int kBits>
    static constexpr int kAtOnce = 4;

    template <int kBits, int kFirst, int kLast, int kTokens, int kParts>
    static void dots(Int (&sums)[kParts][kTokens], const Int (&levels)[kParts][8], const int8_t * x) {
        for (int j = kFirst; j < kLast; ++j) {
            for (int t = 0; t < kTokens; ++t) {
                const Int four = splat_four(x + 32 * t + 4 * j);
                for (int p = 0; p < kParts; ++p) {
                    sums[p][t] = _mm512_dpbusd_epi32(sums[p][t], levels[p][j], four);
                }
            }
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_avx512vnni() {
    static const PackedKernels kernels = { "avx512vnni", Vector::kByteOffset, Vector::kTile, quantize<Vector>,
                                           multiply<Vector> };
    return &kernels;
}

} // namespace coreinfer
