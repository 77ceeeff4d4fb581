#pragma once

// The kernels of packed_product.h without any intrinsics. A file with a type Vector includes this, and is compiled for
// the instructions that Vector uses. Vector has
//
//     kLanes                  32-bit lanes of a vector; kLanes of packed_product.h is a multiple of it
//     kTile                   see PackedKernels; the sums of a tile stay in registers
//     kParts                  how many vectors of the rows of a group go through the weights together, of how many
//                             tokens; the next follow after them
//     kAtOnce                 of how many tokens the products go on at the same time, to hide how long each takes
//     kByteOffset             see PackedKernels
//     Int, Float              vectors of integers and of floats
//     load, store, half       of bytes, of floats, and of half-precision numbers as floats
//     load_floats, load_words of floats, and of 16-bit numbers to a lane each
//     splat, zero             one value in every lane
//     each                    of kStep numbers for each of n tokens, and a factor: a function that splats number k of
//                             token i times the factor
//     kPairs                  see PackedKernels. In a tile in pairs the sums of tokens i and i + 1 are together: vector
//     i
//                             has the lower half of the rows, of token i and then of token i + 1, and vector i + 1 the
//                             upper half. each() of more than two tokens gives numbers in this order, and there are
//     twice                   the numbers of the lower or the upper half of the rows, two times
//     swap_halves             of the sums of two tokens: from a vector for each of them to this order, and back
//     low, high               the lower and the upper four bits of each byte
//     add_fifth               puts bit j of each byte above the four bits of level j
//     add_two                 puts bits 2 j and 2 j + 1 of each byte above the four bits of level j, for four levels
//     two_bits                the four levels of two bits of each byte
//     add_third               puts bit j of each byte above the two bits of level j
//     look_up                 the bytes of a table of 16 that the levels name
//     six_bits, joined        the scales of Q4_K
//     bits, signed_byte       some bits of each lane as a float; a byte of each lane, with its sign
//     dots                    adds the products of levels first to last - 1 with the activations of some tokens, 32
//                             bytes apart, to a sum for each; kBits are those of a level, 8 with what kByteOffset says
//     to_float, mul, fma      arithmetic of floats
//     kMultipliesIntegers     whether mul, add_product and field are there for integers, and as fast as for floats;
//     Factor
//                             is Int then, and Float if not
//     prefetch                of the weights that come next

#include "kernels/packed_product.h"
#include "vector_loops.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

// The sum of values 4 * kFirst to 4 * kLast - 1: each lane has their product with ones.
template <class V, int kFirst, int kLast>
inline int32_t sum_of(const int8_t * values) {
    typename V::Int ones[1][8];
    for (auto & four : ones[0]) {
        four = V::splat(0x01010101);
    }
    typename V::Int sum[1][1] = { { V::splat(0) } };
    V::template dots<4, kFirst, kLast>(sum, ones, values);
    int32_t lane;
    std::memcpy(&lane, &sum, sizeof(lane));
    return lane;
}

template <class V>
void quantize(const float * x, int64_t n_in, int32_t offset, int64_t token, int64_t width, const QuantizedBlocks & to) {
    for (int64_t b = 0, at = token; b < n_in / 32; ++b, at += width, x += 32) {
        int8_t values[32];
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
        for (int i = 0; i < 32; ++i) {
            values[i] = static_cast<int8_t>(nearest(x[i] * inverse));
        }
        for (int i = 0; i < 32; i += 8) {
            std::memcpy(to.values + value_at(at, i, in_pairs(V::kPairs, width)), values + i, 8);
        }
        const int32_t sum[2]  = { sum_of<V, 0, 4>(values), sum_of<V, 4, 8>(values) };
        to.halves[2 * at]     = sum[0];
        to.halves[2 * at + 1] = sum[1];
        to.scales[at]         = scale;
        to.starts[at]         = -offset * (sum[0] + sum[1]);
        to.sums[at]           = scale * static_cast<float>(sum[0] + sum[1]);
    }
}

// The values of the levels of IQ4_NL and IQ4_XS, plus an offset.
struct Iq4Values {
    alignas(16) uint8_t of[16];
};

constexpr Iq4Values iq4_values(int offset) {
    constexpr int kValues[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    Iq4Values     values      = {};
    for (int i = 0; i < 16; ++i) {
        values.of[i] = static_cast<uint8_t>(kValues[i] + offset);
    }
    return values;
}

constexpr int bits_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_K:
            return 5;
        case GGML_TYPE_Q6_K:
            return 6;
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_IQ4_XS:
            return 8;
        default:
            return 4;
    }
}

constexpr bool has_minimum(ggml_type type) {
    return type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1 || type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K;
}

// How far ahead weights are prefetched.
constexpr int64_t kBytesAhead = 6 * 1024;

// Blocks of a group, from block first on. Of a type with super-blocks, first and n are multiples of 8.
struct Chunk {
    const uint8_t * group;
    int64_t         n_all; // of the group
    int64_t         first;
    int64_t         n;
    bool            is_far; // not in a cache yet

    // What to prefetch with block b of this chunk: n_ahead blocks further on, which may be in the next group. A block
    // has size bytes there.
    const uint8_t * ahead(const uint8_t * blocks, int64_t b, int64_t n_ahead, int64_t size, int64_t group_size) const {
        return blocks + n_ahead * size + (b + n_ahead < n ? 0 : group_size - n * size);
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

// stored: where the levels of a block begin, for the lanes of this part; upper: where the bits above their lower four
// do.
template <class V, ggml_type kType>
inline void load_levels(const uint8_t * stored, const uint8_t * upper, typename V::Int (&levels)[8]) {
    if constexpr (kType == GGML_TYPE_Q8_0) {
        for (int j = 0; j < 8; ++j) {
            levels[j] = V::load(stored + 64 * j);
        }
        return;
    }
    load_four<V>(stored, levels);
    if constexpr (bits_of(kType) == 5) {
        V::add_fifth(V::load(upper), levels);
    } else if constexpr (bits_of(kType) == 6) {
        V::add_two(V::load(upper), levels);
        V::add_two(V::load(upper + 64), levels + 4);
    } else if constexpr (bits_of(kType) == 8) {
        static constexpr Iq4Values kValues = iq4_values(V::kByteOffset);
        for (auto & level : levels) {
            level = V::look_up(kValues.of, level);
        }
    }
}

// The scale of a block, and its minimum if the type has one; of Q6_K the scales of both halves.
template <class V>
struct Scales {
    typename V::Float first;
    typename V::Float second;
};

// Of a number for each row, those in vector t of the sums of a part.
template <class V, int kTokens, class Rows>
inline Rows rows_of(Rows x, int t) {
    if constexpr (in_pairs(V::kPairs, kTokens)) {
        return V::twice(x, t % 2 == 1);
    } else {
        return x;
    }
}

// Adds the products of block b of the tile with kParts vectors of rows. What is computed for a token does not depend on
// kTokens.
template <class V, ggml_type kType, int kTokens, int kParts>
inline void add_block(typename V::Float (*sums)[kTokens], const typename V::Int (&levels)[kParts][8],
                      const Scales<V> (&scales)[kParts], const QuantizedInput & in, int64_t b) {
    constexpr int kBits   = bits_of(kType);
    constexpr int kAtOnce = std::min(kTokens, V::template kAtOnce<kBits>);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t += kAtOnce) {
        const int64_t     at = b * kTokens + t;
        const int8_t *    x  = in.values + 32 * at;
        typename V::Int   dot[kParts][kAtOnce];
        typename V::Float product[kParts][kAtOnce];
        const auto        start = [&](const auto & each, int k) {
            for (int p = 0; p < kParts; ++p) {
                for (int i = 0; i < kAtOnce; ++i) {
                    dot[p][i] = each(i, k);
                }
            }
        };
        const auto multiply = [&](bool first) {
            for (int p = 0; p < kParts; ++p) {
                for (int i = 0; i < kAtOnce; ++i) {
                    const auto y     = V::to_float(dot[p][i]);
                    const auto scale = rows_of<V, kTokens>(first ? scales[p].first : scales[p].second, i);
                    product[p][i]    = first ? V::mul(y, scale) : V::fma(y, scale, product[p][i]);
                }
            }
        };
        if constexpr (kType == GGML_TYPE_Q6_K) {
            const auto halves = V::template each<kAtOnce, 2, -32>(in.halves + 2 * at); // the offset of the levels
            start(halves, 0);
            V::template dots<kBits, 0, 4>(dot, levels, x);
            multiply(true);
            start(halves, 1);
            V::template dots<kBits, 4, 8>(dot, levels, x);
            multiply(false);
        } else {
            if constexpr (!has_minimum(kType) && (kBits < 8 || V::kByteOffset != 0)) {
                start(V::template each<kAtOnce>(in.starts + at), 0);
            } else {
                for (auto & part : dot) {
                    for (auto & sum : part) {
                        sum = V::splat(0);
                    }
                }
            }
            V::template dots<kBits, 0, 8>(dot, levels, x);
            multiply(true);
        }
        const auto scale     = V::template each<kAtOnce>(in.scales + at);
        const auto sum_times = V::template each<kAtOnce>(in.sums + at);
        for (int p = 0; p < kParts; ++p) {
            for (int i = 0; i < kAtOnce; ++i) {
                auto & sum = sums[p][t + i];
                sum        = V::fma(product[p][i], scale(i), sum);
                if constexpr (has_minimum(kType)) {
                    sum = V::fma(rows_of<V, kTokens>(scales[p].second, i), sum_times(i), sum);
                }
            }
        }
    }
}

// The sums of some rows of a group, from row first_row on, for each token.
template <class V, ggml_type kType, int kTokens>
struct Sums {
    static constexpr int kParts = V::template kParts<kTokens>;
    // One token needs few registers beside those of the levels of a part; more use what they load for all parts.
    static constexpr int kPartsAtOnce = kTokens == 1 ? 1 : kParts;

    int               first_row;
    typename V::Float of[kParts][kTokens];

    void load(const float * out, int64_t stride, bool start) {
        for (int part = 0; part < kParts; ++part) {
            for (int t = 0; t < kTokens; ++t) {
                of[part][t] = start ? V::zero() : V::load_floats(out + t * stride + lane(part));
            }
        }
        swap_pairs();
    }

    void swap_pairs() {
        if constexpr (in_pairs(V::kPairs, kTokens)) {
            for (auto & part : of) {
                for (int t = 0; t < kTokens; t += 2) {
                    V::swap_halves(part[t], part[t + 1]);
                }
            }
        }
    }

    void store(float * out, int64_t stride) {
        swap_pairs();
        for (int part = 0; part < kParts; ++part) {
            for (int t = 0; t < kTokens; ++t) {
                V::store(out + t * stride + lane(part), of[part][t]);
            }
        }
    }

    // The row of a group that is in the first lane of this part.
    int lane(int part) const { return first_row + part * V::kLanes; }

    // Blocks of 32 are stored in pairs: the scales of both, then their levels, which so are aligned.
    void add_blocks(const Chunk & chunk, const QuantizedInput & in) {
        constexpr Parts   kOf     = parts_of(kType);
        constexpr int64_t kUpper  = kOf.upper > 0 ? 4 * kLanes : 0;
        constexpr int64_t kScales = kOf.n_scales * kLanes;
        constexpr int64_t kLevels = kUpper + kOf.n_levels * kLanes;
        constexpr int64_t kSize   = kScales + kLevels;
        const uint8_t *   pair    = chunk.group + chunk.first * kSize;
        for (int64_t b = 0; b < chunk.n; b += 2, pair += 2 * kSize) {
            const int64_t   n_here = std::min<int64_t>(2, chunk.n - b);
            const uint8_t * next   = chunk.ahead(pair, b, kBytesAhead / kSize, kSize, chunk.n_all * kSize);
            const uint8_t * scales = pair;
            const uint8_t * levels = pair + n_here * kScales;
            for (int64_t i = 0; i < n_here; ++i, scales += kScales, levels += kLevels, next += kSize) {
                if (chunk.is_far) {
                    V::prefetch(next, kSize);
                }
#pragma GCC unroll 4
                for (int part = 0; part < kParts; part += kPartsAtOnce) {
                    typename V::Int level[kPartsAtOnce][8];
                    Scales<V>       of_part[kPartsAtOnce];
                    for (int p = 0; p < kPartsAtOnce; ++p) {
                        const int row = lane(part + p);
                        load_levels<V, kType>(levels + kUpper + 4 * row, levels + 4 * row, level[p]);
                        of_part[p].first = V::half(scales + 2 * row);
                        if constexpr (has_minimum(kType)) {
                            of_part[p].second = V::half(scales + 2 * kLanes + 2 * row);
                        }
                    }
                    add_block<V, kType, kTokens, kPartsAtOnce>(of + part, level, of_part, in, b + i);
                }
            }
        }
    }

    // A super-block of 256 has its scales, then the bits of each block of 32 above the lower four, if there are any,
    // then the lower four bits of each block. Of Q6_K the scale of each super-block stands before all of them, so that
    // vectors of levels are aligned.
    void add_super_blocks(const Chunk & chunk, const QuantizedInput & in) {
        constexpr Parts   kOf    = parts_of(kType);
        constexpr int64_t kUpper = kType == GGML_TYPE_Q6_K ? 8 * kLanes : kType == GGML_TYPE_Q5_K ? 4 * kLanes : 0;
        constexpr int64_t kD     = kType == GGML_TYPE_Q6_K ? 2 * kLanes : 0;
        constexpr int64_t kInner = kOf.n_scales * kLanes - kD;
        constexpr int64_t kSize  = kInner + 8 * kUpper + kOf.n_levels * kLanes;
        const uint8_t *   d      = chunk.group + chunk.first / 8 * kD;
        const uint8_t *   group  = chunk.group + chunk.n_all / 8 * kD + chunk.first / 8 * kSize;
        for (int64_t b = 0; b < chunk.n; b += 8, d += kD, group += kSize) {
            const uint8_t * next =
                chunk.ahead(group, b, 8 * kBytesAhead / kSize, kSize / 8, chunk.n_all / 8 * (kD + kSize));
            SuperScales scales[kParts];
            for (int part = 0; part < kParts; ++part) {
                scales[part].load(kD > 0 ? d : group, group, lane(part));
            }
            const uint8_t * upper  = group + kInner;
            const uint8_t * levels = upper + 8 * kUpper;
            for (int i = 0; i < 8; ++i, upper += kUpper, levels += 16 * kLanes) {
                if (chunk.is_far) {
                    V::prefetch(next + i * kSize / 8, kSize / 8);
                }
#pragma GCC unroll 4
                for (int part = 0; part < kParts; part += kPartsAtOnce) {
                    typename V::Int level[kPartsAtOnce][8];
                    Scales<V>       of_part[kPartsAtOnce];
                    for (int p = 0; p < kPartsAtOnce; ++p) {
                        const int row = lane(part + p);
                        load_levels<V, kType>(levels + 4 * row, upper + 4 * row, level[p]);
                        of_part[p] = scales[part + p].of_block(i);
                    }
                    add_block<V, kType, kTokens, kPartsAtOnce>(of + part, level, of_part, in, b + i);
                }
            }
        }
    }

    // See LowParts.
    void add_low_blocks(const Chunk & chunk, const QuantizedInput & in) {
        constexpr int64_t kUpper = kType == kLow3 ? 4 * kLanes : 0;
        constexpr int64_t kSize  = kUpper + (kType == kLow4 ? 16 : 8) * kLanes;
        const LowParts    parts(kType, 32 * chunk.n_all);
        Scales<V>         steps[kParts];
        for (int64_t b = 0; b < chunk.n; ++b) {
            const int64_t   block   = chunk.first + b;
            const uint8_t * numbers = chunk.group + (parts.scales + 2 * block) * kLanes;
            const uint8_t * levels  = chunk.group + parts.levels * kLanes + block * kSize;
            if (chunk.is_far) {
                V::prefetch(chunk.ahead(levels, b, kBytesAhead / kSize, kSize, parts.size * kLanes), kSize);
            }
            if (!V::kMultipliesIntegers || b == 0 || block % (kSuper / 32) == 0) {
                for (int part = 0; part < kParts; ++part) {
                    const uint8_t * at = chunk.group + block / (kSuper / 32) * 4 * kLanes + 2 * lane(part);
                    steps[part]        = { V::half(at), V::mul(V::half(at + 2 * kLanes), V::splat(-1.0f)) };
                }
            }
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
                const int       row = lane(part);
                typename V::Int level[1][8];
                if constexpr (kType == kLow4) {
                    load_four<V>(levels + 4 * row, level[0]);
                } else {
                    for (int i = 0; i < 2; ++i) {
                        V::two_bits(V::load(levels + kUpper + 4 * kLanes * i + 4 * row), level[0] + 4 * i);
                    }
                }
                if constexpr (kType == kLow3) {
                    V::add_third(V::load(levels + 4 * row), level[0]);
                }
                add_halves(of[part], level, steps[part], V::load_words(numbers + 2 * row), in, b);
            }
        }
    }

    // Adds the products of a block whose halves have scales and minima of their own: numbers of steps. Where integers
    // are multiplied as fast as floats, sums of integers are multiplied with the numbers, and with the steps at the
    // end.
    static void add_halves(typename V::Float (&to)[kTokens], const typename V::Int (&levels)[1][8],
                           const Scales<V> & steps, typename V::Int numbers, const QuantizedInput & in, int64_t b) {
        constexpr int      kAtOnce = std::min(std::min(kTokens, 4), V::template kAtOnce<4>); // two sums of each
        typename V::Factor scales[2], minima[2];
        for (int half = 0; half < 2; ++half) {
            if constexpr (V::kMultipliesIntegers) {
                scales[half] = V::field(numbers, 4 * half, 15);
                minima[half] = V::field(numbers, 8 + 4 * half, 15);
            } else {
                scales[half] = V::mul(steps.first, V::bits(numbers, 4 * half, 15));
                minima[half] = V::mul(steps.second, V::bits(numbers, 8 + 4 * half, 15));
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; t += kAtOnce) {
            const int64_t   at = b * kTokens + t;
            typename V::Int dot[2][1][kAtOnce];
            for (int i = 0; i < kAtOnce; ++i) {
                dot[0][0][i] = dot[1][0][i] = V::splat(0);
            }
            V::template dots<4, 0, 4>(dot[0], levels, in.values + 32 * at);
            V::template dots<4, 4, 8>(dot[1], levels, in.values + 32 * at);
            const auto sum   = V::template each<kAtOnce, 2>(in.halves + 2 * at);
            const auto scale = V::template each<kAtOnce>(in.scales + at);
            for (int i = 0; i < kAtOnce; ++i) {
                auto product = V::zero();
                if constexpr (V::kMultipliesIntegers) {
                    const auto of    = [i](auto rows) { return rows_of<V, kTokens>(rows, i); };
                    const auto least = V::add_product(V::mul(sum(i, 0), of(minima[0])), sum(i, 1), of(minima[1]));
                    const auto above = V::add_product(V::mul(dot[0][0][i], of(scales[0])), dot[1][0][i], of(scales[1]));
                    product          = V::mul(V::to_float(least), of(steps.second));
                    product          = V::fma(V::to_float(above), of(steps.first), product);
                } else {
                    for (int half = 0; half < 2; ++half) {
                        const auto of_half = static_cast<float>(in.halves[2 * (at + i) + half]);
                        product            = V::fma(minima[half], V::splat(of_half), product);
                        product            = V::fma(scales[half], V::to_float(dot[half][0][i]), product);
                    }
                }
                to[t + i] = V::fma(product, scale(i), to[t + i]);
            }
        }
    }

    // The scales of a super-block, from lane on.
    struct SuperScales {
        typename V::Float d;
        typename V::Float m;
        typename V::Int   scales[4];
        typename V::Int   minima[2];

        void load(const uint8_t * at_d, const uint8_t * group, int lane) {
            d = V::half(at_d + 2 * lane);
            if constexpr (kType == GGML_TYPE_Q6_K) {
                for (int i = 0; i < 4; ++i) {
                    scales[i] = V::load(group + 4 * kLanes * i + 4 * lane);
                }
            } else if constexpr (kType == GGML_TYPE_IQ4_XS) {
                scales[0] = V::load_words(group + 2 * kLanes + 2 * lane); // the upper two bits of each
                scales[1] = V::load(group + 4 * kLanes + 4 * lane);
            } else {
                m                 = V::mul(V::half(group + 2 * kLanes + 2 * lane), V::splat(-1.0f));
                const auto first  = V::load(group + 4 * kLanes + 4 * lane);
                const auto second = V::load(group + 8 * kLanes + 4 * lane);
                const auto third  = V::load(group + 12 * kLanes + 4 * lane);
                // four bytes in a lane; of the last four the upper bits are in the bytes of the first
                scales[0] = V::six_bits(first);
                scales[1] = V::joined(V::low(third), first);
                minima[0] = V::six_bits(second);
                minima[1] = V::joined(V::high(third), second);
            }
        }

        Scales<V> of_block(int i) const {
            Scales<V> of;
            if constexpr (kType == GGML_TYPE_Q6_K) {
                of.first  = V::mul(d, V::signed_byte(scales[i / 2], 2 * (i % 2)));
                of.second = V::mul(d, V::signed_byte(scales[i / 2], 2 * (i % 2) + 1));
            } else if constexpr (kType == GGML_TYPE_IQ4_XS) {
                const auto upper = V::fma(V::bits(scales[0], 2 * i, 3), V::splat(16.0f), V::splat(-32.0f));
                of.first         = V::mul(d, V::fma(V::bits(scales[1], 4 * i, 15), V::splat(1.0f), upper));
            } else {
                of.first  = V::mul(d, V::bits(scales[i / 4], 8 * (i % 4), 255));
                of.second = V::mul(m, V::bits(minima[i / 4], 8 * (i % 4), 255));
            }
            return of;
        }
    };
};

// A chunk of a group with kTokens tokens. go_on: to what out has already.
template <class V, ggml_type kType, int kTokens>
NOINLINE void multiply_chunk(const Chunk & chunk, const QuantizedInput & in, float * out, int64_t stride, bool go_on) {
    using Of = Sums<V, kType, kTokens>;
    for (int row = 0; row < kLanes; row += Of::kParts * V::kLanes) {
        const Chunk here = { chunk.group, chunk.n_all, chunk.first, chunk.n, chunk.is_far && row == 0 };
        Of          sums;
        sums.first_row = row;
        sums.load(out, stride, !go_on);
        if constexpr (has_super_blocks(kType)) {
            sums.add_super_blocks(here, in);
        } else if constexpr (is_low(kType)) {
            sums.add_low_blocks(here, in);
        } else {
            sums.add_blocks(here, in);
        }
        sums.store(out, stride);
    }
}

// Activations that the cache next to the processor has room for beside the weights.
constexpr int64_t kActivationsAtOnce = 16 * 1024;

// Bytes of weights that are read for one tile after the other: they stay in the second cache.
constexpr int64_t kWeightsAtOnce = 256 * 1024;

template <class V, ggml_type kType>
struct Product {
    const uint8_t *        groups;
    int64_t                n_groups;
    const QuantizedInput & in;
    int64_t                n_tokens;
    float *                out;
    int64_t                stride;
    bool                   add;

    int64_t group_size() const { return row_size(kType, in.n_in) * kLanes; }

    // The tile at token, n blocks from block first on.
    template <int kTokens>
    void multiply_tile(int64_t token, int64_t first, int64_t n, int64_t first_group, int64_t last_group) const {
        const QuantizedInput tile = in.tile(token, kTokens, first);
        for (int64_t g = first_group; g < last_group; ++g) {
            multiply_chunk<V, kType, kTokens>({ groups + g * group_size(), in.n_in / 32, first, n, token == 0 }, tile,
                                              out + token * stride + g * kLanes, stride, add || first > 0);
        }
    }

    // The tiles from token on, of at most kTokens tokens.
    template <int kTokens>
    void multiply_tiles(int64_t token, int64_t first, int64_t n, int64_t first_group, int64_t last_group) const {
        for (; token + kTokens <= n_tokens; token += kTokens) {
            multiply_tile<kTokens>(token, first, n, first_group, last_group);
        }
        if constexpr (kTokens > 1) {
            multiply_tiles<kTokens / 2>(token, first, n, first_group, last_group);
        }
    }

    void multiply() const {
        if (n_tokens == 1) {
            multiply_tile<1>(0, 0, in.n_in / 32, 0, n_groups);
            return;
        }
        const int64_t tile     = tile_of(0, n_tokens, V::kTile).width;
        const int64_t n_blocks = in.n_in / 32;
        const int64_t at_once  = kActivationsAtOnce / 32 / tile;
        for (int64_t first = 0; first < n_blocks; first += at_once) {
            const int64_t n    = std::min(at_once, n_blocks - first);
            const int64_t size = group_size() * n / n_blocks;
            const int64_t n_g  = tile == n_tokens ? n_groups : std::max<int64_t>(1, kWeightsAtOnce / size);
            for (int64_t g = 0; g < n_groups; g += n_g) {
                multiply_tiles<V::kTile>(0, first, n, g, std::min(n_groups, g + n_g));
            }
        }
    }
};

template <class V, ggml_type kType>
void multiply_type(const uint8_t * groups, int64_t n_groups, const QuantizedInput & in, int64_t n_tokens, float * out,
                   int64_t stride, bool add) {
    Product<V, kType>{ groups, n_groups, in, n_tokens, out, stride, add }.multiply();
}

template <class V>
void multiply(ggml_type type, const uint8_t * groups, int64_t n_groups, const QuantizedInput & in, int64_t n_tokens,
              float * out, int64_t stride, bool add) {
    if (type == kLow4) {
        return multiply_type<V, kLow4>(groups, n_groups, in, n_tokens, out, stride, add);
    }
    if (type == kLow3) {
        return multiply_type<V, kLow3>(groups, n_groups, in, n_tokens, out, stride, add);
    }
    if (type == kLow2) {
        return multiply_type<V, kLow2>(groups, n_groups, in, n_tokens, out, stride, add);
    }
    switch (type) {
        case GGML_TYPE_Q4_0:
            return multiply_type<V, GGML_TYPE_Q4_0>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q4_1:
            return multiply_type<V, GGML_TYPE_Q4_1>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q5_0:
            return multiply_type<V, GGML_TYPE_Q5_0>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q5_1:
            return multiply_type<V, GGML_TYPE_Q5_1>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q8_0:
            return multiply_type<V, GGML_TYPE_Q8_0>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_IQ4_NL:
            return multiply_type<V, GGML_TYPE_IQ4_NL>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q4_K:
            return multiply_type<V, GGML_TYPE_Q4_K>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q5_K:
            return multiply_type<V, GGML_TYPE_Q5_K>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_Q6_K:
            return multiply_type<V, GGML_TYPE_Q6_K>(groups, n_groups, in, n_tokens, out, stride, add);
        case GGML_TYPE_IQ4_XS:
            return multiply_type<V, GGML_TYPE_IQ4_XS>(groups, n_groups, in, n_tokens, out, stride, add);
        default:
            return; // has_layout() says no
    }
}

} // namespace
} // namespace coreinfer
