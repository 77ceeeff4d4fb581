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
        dots_of_four<kFirst, kLast>(sums, levels, x);
    }
};

} // namespace

const PackedKernels * packed_kernels_dotprod() {
    static const PackedKernels kernels = { "dotprod",        Vector::kByteOffset, Vector::kTile, Vector::kPairs,
                                           quantize<Vector>, multiply<Vector>,    attend<Vector> };
    return &kernels;
}

} // namespace coreinfer
