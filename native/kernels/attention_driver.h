#pragma once

// attention::Attend without intrinsics, for a type Vector as packed_product_driver.h describes it. Vector also has
//
//     kRegisters              how many vectors there is room for
//     add, subtract, max      of floats
//     sums                    lane i has the sum of the lanes of vector i
//     exponential             of numbers up to 0; 0 for those below -87. It need not know NaN

#include "kernels/attention.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {
namespace { // each including file has its own, compiled for other instructions

// In place of minus infinity, which this code is compiled without.
constexpr float kNone = -1e30f;

inline bool has_position(const uint8_t * mask, int64_t n) {
    const uint64_t four = 0xfc00fc00fc00fc00; // minus infinities
    for (; n >= 4; n -= 4, mask += 8) {
        uint64_t bits;
        std::memcpy(&bits, mask, sizeof(bits));
        if (bits != four) {
            return true;
        }
    }
    return std::memcmp(mask, &four, 2 * n) != 0;
}

// Rows of keys and of values lie too far apart for the processor to fetch them before they are used.
template <class V>
inline void prefetch_rows(const uint8_t * from, size_t step, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i) {
        V::prefetch(from + i * step, 2 * width);
    }
}

// n rows of half-precision numbers as floats, and rows of zeros up to kChunk.
template <class V>
inline void to_floats(const uint8_t * from, size_t step, int64_t n, int64_t width, float * to) {
    for (int64_t i = 0; i < attention::kChunk; ++i, from += step) {
        for (int64_t d = 0; d < width; d += V::kLanes, to += V::kLanes) {
            V::store(to, i < n ? V::half(from + 2 * d) : V::zero());
        }
    }
}

// Whether a number of a chunk is none, or infinite: by its bits, for comparisons are compiled without such numbers.
inline bool is_any_not_finite(const float * x) {
    uint32_t most = 0;
    for (int64_t i = 0; i < attention::kChunk; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7fffffff;
        most = most > bits ? most : bits;
    }
    return most >= 0x7f800000;
}

template <class V>
inline float largest_of(typename V::Float x) {
    float lanes[V::kLanes];
    V::store(lanes, x);
    float result = lanes[0];
    for (int i = 1; i < V::kLanes; ++i) {
        result = std::max(result, lanes[i]);
    }
    return result;
}

// The same with the numbers of a column beside each other.
template <class V>
inline void to_columns(const uint8_t * from, size_t step, int64_t n, int64_t width, float * to) {
    float row[V::kLanes];
    for (int64_t i = 0; i < attention::kChunk; ++i, from += step) {
        for (int64_t d = 0; d < width; d += V::kLanes) {
            V::store(row, i < n ? V::half(from + 2 * d) : V::zero());
            for (int64_t k = 0; k < V::kLanes; ++k) {
                to[(d + k) * attention::kChunk + i] = row[k];
            }
        }
    }
}

// The products of a query with the keys of a chunk, which are in rows.
template <class V>
inline void products_of(const float * query, const float * keys, int64_t width, float * to) {
    constexpr int kAtOnce = 4;
    for (int64_t i = 0; i < attention::kChunk; i += V::kLanes) {
        typename V::Float products[V::kLanes];
        for (int j = 0; j < V::kLanes; j += kAtOnce) {
            const float *     from = keys + (i + j) * width;
            typename V::Float sum[kAtOnce];
            for (auto & s : sum) {
                s = V::zero();
            }
            for (int64_t d = 0; d < width; d += V::kLanes) {
                const auto q = V::load_floats(query + d);
                for (int k = 0; k < kAtOnce; ++k) {
                    sum[k] = V::fma(q, V::load_floats(from + k * width + d), sum[k]);
                }
            }
            for (int k = 0; k < kAtOnce; ++k) {
                products[j + k] = sum[k];
            }
        }
        V::store(to + i, V::sums(products));
    }
}

// Adds n rows of values, each times a weight, to sums: of kRows lists of weights, from column d on.
template <class V, int kRows, int kVectors>
inline void add_rows(const float * const * weights, int64_t n, const float * values, int64_t width, int64_t d,
                     float * const * sums) {
    typename V::Float sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kVectors; ++i) {
            sum[r][i] = V::load_floats(sums[r] + d + i * V::kLanes);
        }
    }
    for (int64_t c = 0; c < n; ++c) {
        for (int i = 0; i < kVectors; ++i) {
            const auto value = V::load_floats(values + c * width + d + i * V::kLanes);
            for (int r = 0; r < kRows; ++r) {
                sum[r][i] = V::fma(V::splat(weights[r][c]), value, sum[r][i]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kVectors; ++i) {
            V::store(sums[r] + d + i * V::kLanes, sum[r][i]);
        }
    }
}

template <class V, int kRows>
inline void add_all_rows(const float * const * weights, int64_t n, const float * values, int64_t width,
                         float * const * sums) {
    constexpr int     kVectors = V::kRegisters / 8; // half of them for sums
    constexpr int64_t kColumns = kVectors * V::kLanes;
    int64_t           d        = 0;
    for (; d + kColumns <= width; d += kColumns) {
        add_rows<V, kRows, kVectors>(weights, n, values, width, d, sums);
    }
    for (; d < width; d += V::kLanes) {
        add_rows<V, kRows, 1>(weights, n, values, width, d, sums);
    }
}

// Of n_rows lists of weights.
template <class V>
inline void add_products(const float * const * weights, int64_t n_rows, int64_t n, const float * values, int64_t width,
                         float * const * sums) {
    int64_t row = 0;
    for (; row + 4 <= n_rows; row += 4) {
        add_all_rows<V, 4>(weights + row, n, values, width, sums + row);
    }
    for (; row < n_rows; ++row) {
        add_all_rows<V, 1>(weights + row, n, values, width, sums + row);
    }
}

// Makes the products of a row the exponents: scaled, plus the mask. Returns the largest.
template <class V>
inline float to_exponents(float * row, float scale, const uint8_t * mask, int64_t n) {
    auto most = V::splat(kNone);
    for (int64_t i = 0; i < attention::kChunk; i += V::kLanes) {
        auto exponent = V::mul(V::load_floats(row + i), V::splat(scale));
        if (mask && i + V::kLanes <= n) {
            exponent = V::max(V::splat(kNone), V::add(exponent, V::half(mask + 2 * i)));
        } else if (i + V::kLanes > n) { // not all positions are there
            float lanes[V::kLanes];
            V::store(lanes, exponent);
            for (int64_t k = 0; k < V::kLanes; ++k) {
                uint16_t bits = i + k < n ? 0 : 0xfc00;
                if (mask && i + k < n) {
                    std::memcpy(&bits, mask + 2 * (i + k), sizeof(bits));
                }
                lanes[k] = bits == 0xfc00 ? kNone : lanes[k] + ggml_fp16_to_fp32(bits);
            }
            exponent = V::load_floats(lanes);
        }
        V::store(row + i, exponent);
        most = V::max(most, exponent);
    }
    return largest_of<V>(most);
}

// Makes the exponents of a row weights, and what part has fit for them.
template <class V>
inline void to_weights(float * row, float most, int64_t n_value, float * part) {
    const bool is_bad = is_any_not_finite(row);
    float      lanes[V::kLanes];
    V::store(lanes, V::exponential(V::splat(part[0] - most))); // what is there is of another largest exponent
    const float factor = lanes[0];
    for (int64_t d = attention::kWidth; factor != 1.0f && d < attention::part_size(n_value); d += V::kLanes) {
        V::store(part + d, V::mul(V::load_floats(part + d), V::splat(factor)));
    }
    auto sum = V::zero();
    for (int64_t c = 0; c < attention::kChunk; c += V::kLanes) {
        const auto weight = V::exponential(V::subtract(V::load_floats(row + c), V::splat(most)));
        V::store(row + c, weight);
        sum = V::add(sum, weight);
    }
    part[0] = most;
    part[1] *= factor;
    V::store(lanes, sum);
    for (const float x : lanes) {
        part[1] += x;
    }
    if (is_bad) {
        const uint32_t nan = 0x7fc00000;
        std::memcpy(part + 1, &nan, sizeof(nan));
    }
}

template <class V>
void attend(const attention::Head & head, int64_t chunk, int64_t first, int64_t n_rows, float * scratch,
            float * parts) {
    const int64_t   position = chunk * attention::kChunk;
    const int64_t   n        = std::min(attention::kChunk, head.n_positions - position);
    const int64_t   size     = attention::part_size(head.n_value);
    const uint8_t * masks[attention::kRows];
    const float *   queries[attention::kRows];
    float *         of[attention::kRows];
    int64_t         n_here = 0; // of the rows, which have a position here
    bool            is_any = true;
    for (int64_t row = first; row < first + n_rows; ++row) {
        const int64_t   token = row / head.n_shared;
        const uint8_t * mask  = head.mask ? head.mask + token * head.mask_step + 2 * position : nullptr;
        if (mask && (row == first || row % head.n_shared == 0)) { // the rows of a token have one
            is_any = has_position(mask, n);
        }
        if (is_any) {
            masks[n_here]   = mask;
            queries[n_here] = reinterpret_cast<const float *>(head.queries + token * head.query_step +
                                                              row % head.n_shared * head.query_head_step);
            of[n_here++]    = parts + (row - first) * size;
        }
    }
    if (n_here == 0) {
        return;
    }
    float * const   keys    = scratch;
    float * const   values  = keys + attention::kChunk * head.n_key;
    float * const   weights = values + attention::kChunk * head.n_value;
    const uint8_t * from    = head.keys + position * head.key_step;
    const uint8_t * from_v  = head.values + position * head.value_step;
    const float *   lists[attention::kRows];
    float *         sums[attention::kRows];
    for (int64_t row = 0; row < n_here; ++row) {
        lists[row] = sums[row] = weights + row * attention::kChunk;
    }
    prefetch_rows<V>(from_v, head.value_step, n, head.n_value);
    if (n_here >= attention::kManyRows) {
        to_columns<V>(from, head.key_step, n, head.n_key, keys);
        std::fill_n(weights, n_here * attention::kChunk, 0.0f);
        add_products<V>(queries, n_here, head.n_key, keys, attention::kChunk, sums);
    } else {
        to_floats<V>(from, head.key_step, n, head.n_key, keys);
        for (int64_t row = 0; row < n_here; ++row) {
            products_of<V>(queries[row], keys, head.n_key, sums[row]);
        }
    }
    for (int64_t row = 0; row < n_here; ++row) {
        const float most = to_exponents<V>(sums[row], head.scale, masks[row], n);
        to_weights<V>(sums[row], std::max(most, of[row][0]), head.n_value, of[row]);
        sums[row] = of[row] + attention::kWidth;
    }
    prefetch_rows<V>(from + attention::kChunk * head.key_step, head.key_step,
                     std::min(attention::kChunk, head.n_positions - position - n), head.n_key);
    to_floats<V>(from_v, head.value_step, n, head.n_value, values);
    add_products<V>(lists, n_here, attention::kChunk, values, head.n_value, sums);
}

} // namespace
} // namespace coreinfer
