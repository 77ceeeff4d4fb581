#include "kernels/packed_product_driver.h"
#include "kernels/vector256.h"

namespace coreinfer {

namespace {

struct Vector : Vector256 {
    static constexpr int kTile       = 4;
    static constexpr int kAtOnce     = 4;
    static constexpr int kByteOffset = 128;

    template <int kBits, int kFirst, int kLast, int kTokens>
    static void dots(Int (&sums)[kTokens], const Int (&levels)[8], const int8_t * x) {
        for (int j = kFirst; j < kLast; ++j) {
            for (int t = 0; t < kTokens; ++t) {
                sums[t] = _mm256_dpbusd_avx_epi32(sums[t], levels[j], splat_four(x + 32 * t + 4 * j));
            }
        }
    }
};

} // namespace

const PackedKernels * packed_kernels_avxvnni() {
    static const PackedKernels kernels = { "avxvnni", Vector::kByteOffset, quantize, multiply<Vector> };
    return &kernels;
}

} // namespace coreinfer
