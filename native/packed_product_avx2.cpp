#include "packed_product_x86.h"
#include "packed_vector_256.h"

namespace coreinfer {

namespace {

struct Vector : Vector256 {
    // The sum of two products has 16 bits: enough for levels of 5 bits, not for those of 8.
    static Int dot(Int sum, Int levels, Int x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(levels, x), _mm256_set1_epi16(1)));
    }
};

} // namespace

const PackedKernels * packed_kernels_avx2() {
    static const PackedKernels kernels = { quantize, multiply<Vector>, false };
    return &kernels;
}

} // namespace coreinfer
