#include "statistics.h"

#include "quant.h"
#include "vector_loops.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace coreinfer {

namespace {

constexpr int64_t kStrip = 64; // neurons whose sums stay in registers or the nearest cache over all tokens

// As integers: the bits of positive floats have their order, and NaN has a place in it.
int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// How many values have these bits or larger ones.
CLONES int64_t count_from(const float * act, int64_t n, int32_t least) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        count += bits_of(act[i]) >= least;
    }
    return count;
}

// The least of the largest positive values; larger than any where none is positive. Found bit by bit, which takes no
// memory: a computing thread that asked for some in vain would end the process.
float top_threshold(const float * act, int64_t n, float share) {
    const auto n_positive = static_cast<float>(count_from(act, n, 1));
    const auto n_top      = static_cast<int64_t>(std::ceil(share * n_positive));
    if (n_top == 0) {
        return FLT_MAX;
    }
    int32_t least = 0;
    for (int32_t bit = 1 << 30; bit > 0; bit >>= 1) {
        if (count_from(act, n, least | bit) >= std::min(n_top, static_cast<int64_t>(n_positive))) {
            least |= bit;
        }
    }
    float result;
    std::memcpy(&result, &least, sizeof(result));
    return result;
}

// A width that the compiler knows makes vector code.
template <typename Width>
ALWAYS_INLINE inline void add_strip(const float * x, int64_t stride, int64_t n_rows, const TokenMeasure * measures,
                                    const Sums & sums, Width width) {
    float sum[kStrip]        = {};
    float square[kStrip]     = {};
    float normalized[kStrip] = {};
    float top[kStrip]        = {};
    float active[kStrip]     = {};
    for (int64_t row = 0; row < n_rows; ++row) {
        const float * at = x + row * stride;
        for (int64_t i = 0; i < width; ++i) {
            sum[i] += at[i];
            square[i] += at[i] * at[i];
        }
        if (sums.normalized_sq) {
            const float scale = measures[row].inverse_square;
            for (int64_t i = 0; i < width; ++i) {
                normalized[i] += at[i] * at[i] * scale;
            }
        }
        if (sums.top) {
            const float least = measures[row].top;
            for (int64_t i = 0; i < width; ++i) {
                top[i] += at[i] >= least ? 1.0f : 0.0f;
            }
        }
        if (sums.active) {
            for (int64_t i = 0; i < width; ++i) {
                active[i] += at[i] != 0.0f ? 1.0f : 0.0f;
            }
        }
    }
    for (int64_t i = 0; i < width; ++i) {
        sums.sum[i] += sum[i];
        sums.sum_sq[i] += square[i];
    }
    for (int64_t i = 0; sums.normalized_sq && i < width; ++i) {
        sums.normalized_sq[i] += normalized[i];
    }
    for (int64_t i = 0; sums.top && i < width; ++i) {
        sums.top[i] += top[i];
    }
    for (int64_t i = 0; sums.active && i < width; ++i) {
        sums.active[i] += active[i];
    }
}

} // namespace

TokenMeasure measure_token(const float * act, int64_t n, float top_share) {
    const float norm = dot(act, act, n);
    // of a smaller norm the inverse is infinite, and times a zero no number
    return { norm >= FLT_MIN ? 1.0f / norm : 0.0f, top_share > 0.0f ? top_threshold(act, n, top_share) : FLT_MAX };
}

Sums Sums::from(int64_t neuron) const {
    return { sum + neuron, sum_sq + neuron, normalized_sq ? normalized_sq + neuron : nullptr,
             top ? top + neuron : nullptr, active ? active + neuron : nullptr };
}

CLONES void add_tokens(const float * x, int64_t stride, int64_t n_rows, const TokenMeasure * measures,
                       const Sums & sums, int64_t n) {
    int64_t start = 0;
    for (; start + kStrip <= n; start += kStrip) {
        add_strip(x + start, stride, n_rows, measures, sums.from(start), std::integral_constant<int64_t, kStrip>());
    }
    if (start < n) {
        add_strip(x + start, stride, n_rows, measures, sums.from(start), n - start);
    }
}

} // namespace coreinfer
