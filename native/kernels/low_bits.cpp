#include "kernels/low_bits.h"

#include "half.h"
#include "vector_loops.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {

namespace {

constexpr int kHalf  = 16; // weights with a scale and a minimum of their own
constexpr int kBatch = 16; // halves of blocks that are quantised at once, one in each lane of a vector

// One number for each half of a batch.
struct Lanes {
    float of[kBatch];
};

// The weights of a batch: those of the same place in each half beside each other.
using Batch = Lanes[kHalf];

// What the formats keep of a super-block: scale and minimum of a half are multiples of these.
struct Steps {
    float    scale;
    float    minimum;
    uint16_t half_scale;
    uint16_t half_minimum;
};

ALWAYS_INLINE inline float least(float a, float b) {
    return a < b ? a : b;
}

ALWAYS_INLINE inline float most(float a, float b) {
    return a > b ? a : b;
}

// The number of steps from 0 to 15 nearest to x, which is not below zero.
ALWAYS_INLINE inline float nearest_step(float x) {
    return static_cast<float>(static_cast<int>(least(x + 0.5f, 15.0f)));
}

ALWAYS_INLINE inline void load_batch(const float * weights, int64_t n, Batch & x) {
    for (int half = 0; half < kBatch; ++half) {
        for (int i = 0; i < kHalf; ++i) {
            x[i].of[half] = half * kHalf < n ? weights[half * kHalf + i] : 0.0f;
        }
    }
}

// The largest value below zero, and the distance from there to the largest above.
ALWAYS_INLINE inline void ranges(const Batch & x, Lanes & low, Lanes & range) {
    for (int h = 0; h < kBatch; ++h) {
        low.of[h] = range.of[h] = 0.0f;
    }
    for (int i = 0; i < kHalf; ++i) {
        for (int h = 0; h < kBatch; ++h) {
            low.of[h]   = least(low.of[h], x[i].of[h]);
            range.of[h] = most(range.of[h], x[i].of[h]);
        }
    }
    for (int h = 0; h < kBatch; ++h) {
        low.of[h] = -low.of[h];
        range.of[h] += low.of[h];
    }
}

CLONES void find_most(const float * weights, int64_t n, float & most_low, float & most_range) {
    most_low = most_range = 0.0f;
    for (int64_t at = 0; at < n; at += kBatch * kHalf) {
        Batch x;
        Lanes low, range;
        load_batch(weights + at, n - at, x);
        ranges(x, low, range);
        for (int h = 0; h < kBatch; ++h) {
            most_low   = most(most_low, low.of[h]);
            most_range = most(most_range, range.of[h]);
        }
    }
}

// A step whose multiples up to 15 reach this far. Half precision ends at 65504, and a step of zero divides nothing.
Steps steps_of(float most_low, float most_range, float top) {
    Steps steps;
    steps.half_scale   = to_half(std::min(most_range / (15.0f * top), 65504.0f));
    steps.half_minimum = to_half(std::min(most_low / 15.0f, 65504.0f));
    steps.scale        = from_half(steps.half_scale);
    steps.minimum      = from_half(steps.half_minimum);
    return steps;
}

// The level of a weight: the nearest multiple of a scale from the minimum on.
ALWAYS_INLINE inline float level_of(float x, float minimum, float inverse, float top) {
    return static_cast<float>(static_cast<int>(least(most((x + minimum) * inverse + 0.5f, 0.0f), top)));
}

// Quantises a batch. scale, minimum: numbers of steps. levels: [kHalf] of each half.
CLONES void quantize_batch(const float * weights, int64_t n, const Steps & steps, float top, uint8_t * scale,
                           uint8_t * minimum, uint8_t * levels) {
    // numbers of steps beside those of the range of values: of few levels the best reach less far
    constexpr float kScales[] = { 0.0f, -1.0f, 1.0f, -2.0f, -3.0f };
    constexpr float kMinima[] = { 0.0f, -1.0f, 1.0f, -2.0f };
    const int       n_scales  = top > 3.0f ? 3 : 5;
    const int       n_minima  = top > 3.0f ? 3 : 4;

    Batch x;
    Lanes low, range, first_scale, first_minimum, error, best_scale, best_minimum;
    load_batch(weights, n, x);
    ranges(x, low, range);
    const float inverse_scale   = steps.scale > 0.0f ? 1.0f / (top * steps.scale) : 0.0f;
    const float inverse_minimum = steps.minimum > 0.0f ? 1.0f / steps.minimum : 0.0f;
    for (int h = 0; h < kBatch; ++h) {
        best_scale.of[h] = first_scale.of[h] = nearest_step(range.of[h] * inverse_scale);
        best_minimum.of[h] = first_minimum.of[h] = nearest_step(low.of[h] * inverse_minimum);
        error.of[h]                              = 3e38f;
    }
    for (int try_scale = 0; try_scale < n_scales; ++try_scale) {
        for (int try_minimum = 0; try_minimum < n_minima; ++try_minimum) {
            Lanes s, m, d, z, inverse, sum;
            for (int h = 0; h < kBatch; ++h) {
                s.of[h]       = least(most(first_scale.of[h] + kScales[try_scale], 0.0f), 15.0f);
                m.of[h]       = least(most(first_minimum.of[h] + kMinima[try_minimum], 0.0f), 15.0f);
                d.of[h]       = s.of[h] * steps.scale;
                z.of[h]       = m.of[h] * steps.minimum;
                inverse.of[h] = d.of[h] > 1e-30f ? 1.0f / d.of[h] : 0.0f;
                sum.of[h]     = 0.0f;
            }
            for (int i = 0; i < kHalf; ++i) {
                for (int h = 0; h < kBatch; ++h) {
                    const float level = level_of(x[i].of[h], z.of[h], inverse.of[h], top);
                    const float wrong = x[i].of[h] + z.of[h] - level * d.of[h];
                    sum.of[h] += wrong * wrong;
                }
            }
            for (int h = 0; h < kBatch; ++h) {
                const bool better  = sum.of[h] < error.of[h];
                error.of[h]        = better ? sum.of[h] : error.of[h];
                best_scale.of[h]   = better ? s.of[h] : best_scale.of[h];
                best_minimum.of[h] = better ? m.of[h] : best_minimum.of[h];
            }
        }
    }
    for (int h = 0; h < kBatch; ++h) {
        scale[h]            = static_cast<uint8_t>(best_scale.of[h]);
        minimum[h]          = static_cast<uint8_t>(best_minimum.of[h]);
        const float d       = best_scale.of[h] * steps.scale;
        const float z       = best_minimum.of[h] * steps.minimum;
        const float inverse = d > 1e-30f ? 1.0f / d : 0.0f;
        for (int i = 0; i < kHalf; ++i) {
            levels[h * kHalf + i] = static_cast<uint8_t>(level_of(x[i].of[h], z, inverse, top));
        }
    }
}

// The levels of a block of 32, as the kernels unpack them: see LowParts.
void pack_levels(ggml_type type, const uint8_t * levels, uint8_t * to) {
    if (type == kLow3) {
        for (int k = 0; k < 4; ++k) {
            int upper = 0;
            for (int j = 0; j < 8; ++j) {
                upper |= (levels[4 * j + k] >> 2) << j;
            }
            to[k] = static_cast<uint8_t>(upper);
        }
        to += 4;
    }
    for (int word = 0; word < 2; ++word) {
        for (int k = 0; k < 4; ++k) {
            int four = 0;
            for (int j = 0; j < 4; ++j) {
                four |= (levels[16 * word + 4 * j + k] & 3) << 2 * j;
            }
            to[4 * word + k] = static_cast<uint8_t>(four);
        }
    }
}

int unpack_level(ggml_type type, const uint8_t * from, int i) {
    const int k     = i % 4;
    const int upper = type == kLow3 ? (from[k] >> i / 4 & 1) << 2 : 0;
    from += type == kLow3 ? 4 : 0;
    return upper | (from[4 * (i / 16) + k] >> 2 * (i / 4 % 4) & 3);
}

} // namespace

void quantize_low_row(ggml_type type, const float * weights, int64_t n, uint8_t * row) {
    const LowParts parts(type, n);
    const float    top = type == kLow3 ? 7.0f : 3.0f;
    std::memset(row, 0, parts.size);
    for (int64_t super = 0; super < parts.n_supers; ++super) {
        const int64_t first = super * kSuper;
        const int64_t end   = std::min(n, first + kSuper);
        float         most_low, most_range;
        find_most(weights + first, end - first, most_low, most_range);
        const Steps steps = steps_of(most_low, most_range, top);
        std::memcpy(row + 4 * super, &steps.half_scale, 2);
        std::memcpy(row + 4 * super + 2, &steps.half_minimum, 2);
        for (int64_t at = first; at < end; at += kBatch * kHalf) {
            uint8_t scale[kBatch], minimum[kBatch], levels[kBatch * kHalf];
            quantize_batch(weights + at, end - at, steps, top, scale, minimum, levels);
            const int64_t n_blocks = std::min<int64_t>(kBatch / 2, (end - at) / 32);
            for (int64_t b = 0; b < n_blocks; ++b) {
                const int64_t block               = at / 32 + b;
                row[parts.scales + 2 * block]     = static_cast<uint8_t>(scale[2 * b] | scale[2 * b + 1] << 4);
                row[parts.scales + 2 * block + 1] = static_cast<uint8_t>(minimum[2 * b] | minimum[2 * b + 1] << 4);
                pack_levels(type, levels + 32 * b, row + parts.levels + parts.n_levels * block);
            }
        }
    }
}

void dequantize_low_row(ggml_type type, const uint8_t * row, int64_t n, float * weights) {
    const LowParts parts(type, n);
    for (int64_t block = 0; block < n / 32; ++block, weights += 32) {
        uint16_t steps[2];
        std::memcpy(steps, row + 4 * (32 * block / kSuper), sizeof(steps));
        const uint8_t * scales = row + parts.scales + 2 * block;
        for (int i = 0; i < 32; ++i) {
            const int shift = i / kHalf * 4;
            weights[i] = from_half(steps[0]) * static_cast<float>(scales[0] >> shift & 15) *
                             static_cast<float>(unpack_level(type, row + parts.levels + parts.n_levels * block, i)) -
                         from_half(steps[1]) * static_cast<float>(scales[1] >> shift & 15);
        }
    }
}

} // namespace coreinfer
