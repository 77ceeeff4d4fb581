#pragma once

// V::dots() of packed_product_driver.h in two ways, for the instructions that a processor has. A file of kernels
// includes this.

#include <cstdint>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

// With V::dot(), which adds the products of four levels and four activations to each lane.
template <class V, int kFirst, int kLast, int kTokens, int kParts>
inline void dots_of_four(typename V::Int (&sums)[kParts][kTokens], const typename V::Int (&levels)[kParts][8],
                         const int8_t * x) {
    for (int j = kFirst; j < kLast; ++j) {
        for (int t = 0; t < kTokens; ++t) {
            const auto four = V::splat_four(x + 32 * t + 4 * j);
            for (int p = 0; p < kParts; ++p) {
                sums[p][t] = V::dot(sums[p][t], levels[p][j], four);
            }
        }
    }
}

// With V::two_products(), sums of two products in 16 bits.
template <class V, int kBits, int kFirst, int kLast, int kTokens, int kParts>
inline void dots_of_two(typename V::Int (&sums)[kParts][kTokens], const typename V::Int (&levels)[kParts][8],
                        const int8_t * x) {
    // as many sums of two products, at most 127 times the largest level each, as 16 bits hold
    constexpr int kFit  = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
    constexpr int kStep = kFit < kLast - kFirst ? kFit : kLast - kFirst;
    for (int j = kFirst; j < kLast; j += kStep) {
        typename V::Int words[kParts][kTokens];
        for (auto & part : words) {
            for (auto & sum : part) {
                sum = V::splat(0);
            }
        }
        for (int k = j; k < j + kStep; ++k) {
            for (int t = 0; t < kTokens; ++t) {
                const auto four = V::splat_four(x + 32 * t + 4 * k);
                for (int p = 0; p < kParts; ++p) {
                    const auto two = V::template two_products<kBits>(levels[p][k], four);
                    words[p][t]    = V::add_words(words[p][t], two);
                    // gcc would go through one token after the other, with more than fits in registers
                    V::compute_now(words[p][t]);
                }
            }
        }
        for (int t = 0; t < kTokens; ++t) {
            for (int p = 0; p < kParts; ++p) {
                sums[p][t] = V::add_pairs(sums[p][t], words[p][t]);
            }
        }
    }
}

} // namespace
} // namespace coreinfer
