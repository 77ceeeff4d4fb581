#pragma once

// The kernels of packed_product.h without any intrinsics. A file with a type Vector includes this, and is compiled for
// the instructions that Vector uses. Vector has
//
//     kLanes                  32-bit lanes of a vector; kLanes of packed_product.h is a multiple of it
//     Int, Float              vectors of integers and of floats
//     load, store, half       of bytes, of floats, and of half-precision numbers as floats
//     splat, zero             one value in every lane
//     low, high               the lower and the upper four bits of each byte
//     add_fifth               puts bit j of each byte above the four bits of level j
//     six_bits, joined, byte  the scales of Q4_K
//     dot                     adds the products of four levels and four activations to each lane
//     to_float, mul, fma      arithmetic of floats
//     prefetch                of the weights that come next

#include "kernels/packed_product.h"
#include "vector_loops.h"

#include <cstring>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

void quantize(const float * x, int64_t n_in, int32_t offset, int8_t * values, float * scales, int32_t * starts,
              float * sums, int32_t * halves) {
    for (int64_t b = 0; b < n_in / 32; ++b, x += 32, values += 32) {
        // as integers, of which those of NaN are the largest: then the scale, and so the products, are NaN too
        uint32_t most = 0;
        for (int i = 0; i < 32; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, sizeof(bits));
            bits &= 0x7fffffff;
            most = most > bits ? most : bits;
        }
        float largest;
        std::memcpy(&largest, &most, sizeof(largest));
        const float scale   = largest / 127.0f;
        const float inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
        int32_t     sum[2]  = { 0, 0 };
        for (int half = 0; half < 2; ++half) {
            for (int i = 16 * half; i < 16 * half + 16; ++i) {
                values[i] = static_cast<int8_t>(nearest(x[i] * inverse));
                sum[half] += values[i];
            }
            halves[2 * b + half] = -offset * sum[half];
        }
        scales[b] = scale;
        starts[b] = -offset * (sum[0] + sum[1]);
        sums[b]   = scale * static_cast<float>(sum[0] + sum[1]);
    }
}

// The sums of one group for each token.
template <class V, int kTokens>
struct Sums {
    static constexpr int kParts = kLanes / V::kLanes;

    typename V::Float of[kTokens][kParts];

    Sums() {
        for (auto & token : of) {
            for (auto & sum : token) {
                sum = V::zero();
            }
        }
    }

    void store(float * out, int64_t stride) const {
        for (int t = 0; t < kTokens; ++t) {
            for (int part = 0; part < kParts; ++part) {
                V::store(out + t * stride + part * V::kLanes, of[t][part]);
            }
        }
    }
};

// Vector j of a block holds the weights 4 j to 4 j + 3 of each row. Of four bits each, vector j is in the low and
// vector j + 4 in the high half of stored vector j.
template <class V>
inline void load_four(const uint8_t * stored, typename V::Int (&levels)[8]) {
    for (int j = 0; j < 4; ++j) {
        const auto both = V::load(stored + 64 * j);
        levels[j]       = V::low(both);
        levels[j + 4]   = V::high(both);
    }
}

// stored: where the levels of a block begin, for the lanes of this part.
template <class V, ggml_type kType>
inline void load_levels(const uint8_t * stored, typename V::Int (&levels)[8]) {
    if constexpr (kType == GGML_TYPE_Q8_0) {
        for (int j = 0; j < 8; ++j) {
            levels[j] = V::load(stored + 64 * j);
        }
    } else if constexpr (parts_of(kType).fifth > 0) {
        load_four<V>(stored + 4 * kLanes, levels);
        const auto fifth = V::load(stored);
        V::add_fifth(fifth, levels);
    } else {
        load_four<V>(stored, levels);
    }
}

template <class V>
inline typename V::Int dot_block(typename V::Int sum, const typename V::Int (&levels)[8], const int8_t * x) {
    for (int j = 0; j < 8; ++j) {
        int32_t four;
        std::memcpy(&four, x + 4 * j, sizeof(four));
        sum = V::dot(sum, levels[j], V::splat(four));
    }
    return sum;
}

// One group with kTokens tokens.
template <class V, ggml_type kType, int kTokens>
inline void multiply_blocks(const uint8_t * group, const QuantizedInput & in, float * out, int64_t stride) {
    constexpr Parts   kOf      = parts_of(kType);
    constexpr int64_t kScales  = kOf.n_scales * kLanes;
    constexpr int64_t kLevels  = (kOf.n_levels + (kOf.fifth > 0 ? 4 : 0)) * kLanes;
    const int64_t     n_blocks = in.n_in / 32;
    const uint8_t *   scales   = group;
    const uint8_t *   levels   = group + n_blocks * kScales;

    Sums<V, kTokens> sums;
    for (int64_t b = 0; b < n_blocks; ++b, scales += kScales, levels += kLevels) {
        V::prefetch(levels);
        for (int part = 0; part < sums.kParts; ++part) {
            typename V::Int level[8];
            load_levels<V, kType>(levels + part * 4 * V::kLanes, level);
            const auto d = V::half(scales + part * 2 * V::kLanes);
            for (int t = 0; t < kTokens; ++t) {
                const int64_t at  = t * n_blocks + b;
                const auto    dot = dot_block<V>(V::splat(in.starts[at]), level, in.values + t * in.n_in + 32 * b);
                auto &        sum = sums.of[t][part];
                sum               = V::fma(V::to_float(dot), V::mul(d, V::splat(in.scales[at])), sum);
                if constexpr (kOf.n_scales == 4) { // the second is the minimum
                    sum = V::fma(V::half(scales + 2 * kLanes + part * 2 * V::kLanes), V::splat(in.sums[at]), sum);
                }
            }
        }
    }
    sums.store(out, stride);
}

// Q4_K: super-blocks of 256, each with its scales d and m, three vectors of 6-bit scales and minima as ggml has them,
// and for each pair of blocks of 32 eight vectors, the first block in the low halves.
template <class V, int kTokens>
inline void multiply_super_blocks(const uint8_t * group, const QuantizedInput & in, float * out, int64_t stride) {
    const int64_t n_blocks = in.n_in / 32;

    Sums<V, kTokens> sums;
    for (int64_t b = 0; b < n_blocks; b += 8, group += kLanes * 144) {
        for (int part = 0; part < sums.kParts; ++part) {
            const uint8_t * at = group + part * 2 * V::kLanes;
            const auto      d  = V::half(at);
            const auto      m  = V::half(at + 32);
            at                 = group + 64 + part * 4 * V::kLanes;
            const auto first   = V::load(at);
            const auto second  = V::load(at + 64);
            const auto third   = V::load(at + 128);
            // four bytes in a lane; of the last four the upper bits are in the bytes of the first
            const typename V::Int scales[2] = { V::six_bits(first), V::joined(V::low(third), first) };
            const typename V::Int minima[2] = { V::six_bits(second), V::joined(V::high(third), second) };
            const uint8_t *       stored    = at + 192;
            for (int pair = 0; pair < 4; ++pair, stored += 512) {
                V::prefetch(stored);
                V::prefetch(stored + 256);
                typename V::Int level[2][8];
                for (int j = 0; j < 8; ++j) {
                    const auto both = V::load(stored + 64 * j);
                    level[0][j]     = V::low(both);
                    level[1][j]     = V::high(both);
                }
                for (int half = 0; half < 2; ++half) {
                    const int  i       = 2 * pair + half;
                    const auto scale   = V::mul(d, V::byte(scales[i / 4], i % 4));
                    const auto minimum = V::mul(m, V::byte(minima[i / 4], i % 4));
                    for (int t = 0; t < kTokens; ++t) {
                        const int64_t k = t * n_blocks + b + i;
                        const auto dot = dot_block<V>(V::splat(0), level[half], in.values + t * in.n_in + 32 * (b + i));
                        auto &     sum = sums.of[t][part];
                        sum            = V::fma(V::to_float(dot), V::mul(scale, V::splat(in.scales[k])), sum);
                        sum            = V::fma(minimum, V::splat(-in.sums[k]), sum);
                    }
                }
            }
        }
    }
    sums.store(out, stride);
}

template <class V, ggml_type kType, int kTokens>
inline void multiply_group(const uint8_t * group, const QuantizedInput & in, float * out, int64_t stride) {
    if constexpr (kType == GGML_TYPE_Q4_K) {
        multiply_super_blocks<V, kTokens>(group, in, out, stride);
    } else {
        multiply_blocks<V, kType, kTokens>(group, in, out, stride);
    }
}

template <class V, ggml_type kType>
void multiply_groups(const uint8_t * groups, int64_t n_groups, const QuantizedInput & in, int64_t n_tokens, float * out,
                     int64_t stride) {
    const size_t size = ggml_row_size(kType, in.n_in) * kLanes;
    for (int64_t g = 0; g < n_groups; ++g, groups += size, out += kLanes) {
        QuantizedInput from = in;
        float *        to   = out;
        int64_t        left = n_tokens;
        const auto     next = [&](int n) {
            from.values += n * in.n_in;
            from.scales += n * (in.n_in / 32);
            from.starts += n * (in.n_in / 32);
            from.sums += n * (in.n_in / 32);
            to += n * stride;
            left -= n;
        };
        for (; left >= 4; next(4)) {
            multiply_group<V, kType, 4>(groups, from, to, stride);
        }
        for (; left > 0; next(1)) {
            multiply_group<V, kType, 1>(groups, from, to, stride);
        }
    }
}

template <class V>
void multiply(ggml_type type, const uint8_t * groups, int64_t n_groups, const QuantizedInput & in, int64_t n_tokens,
              float * out, int64_t stride) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return multiply_groups<V, GGML_TYPE_Q4_0>(groups, n_groups, in, n_tokens, out, stride);
        case GGML_TYPE_Q4_1:
            return multiply_groups<V, GGML_TYPE_Q4_1>(groups, n_groups, in, n_tokens, out, stride);
        case GGML_TYPE_Q5_0:
            return multiply_groups<V, GGML_TYPE_Q5_0>(groups, n_groups, in, n_tokens, out, stride);
        case GGML_TYPE_Q5_1:
            return multiply_groups<V, GGML_TYPE_Q5_1>(groups, n_groups, in, n_tokens, out, stride);
        case GGML_TYPE_Q8_0:
            return multiply_groups<V, GGML_TYPE_Q8_0>(groups, n_groups, in, n_tokens, out, stride);
        case GGML_TYPE_Q4_K:
            return multiply_groups<V, GGML_TYPE_Q4_K>(groups, n_groups, in, n_tokens, out, stride);
        default:
            return; // is_packable() says no
    }
}

} // namespace
} // namespace coreinfer
