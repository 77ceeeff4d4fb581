#include "kernels/low_bits.h"

#include "half.h"
#include "vector_loops.h"

#include <algorithm>
#include <cstring>

// A loop over the lanes, which the compiler makes vector code of only while it is a loop.
#if defined(__GNUC__) && !defined(__clang__)
#    define EACH_LANE(h) _Pragma("GCC unroll 1") for (int h = 0; h < kBatch; ++h)
#else
#    define EACH_LANE(h) for (int h = 0; h < kBatch; ++h)
#endif

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
    EACH_LANE(h) {
        low.of[h] = range.of[h] = 0.0f;
    }
    for (int i = 0; i < kHalf; ++i) {
        EACH_LANE(h) {
            low.of[h]   = least(low.of[h], x[i].of[h]);
            range.of[h] = most(range.of[h], x[i].of[h]);
        }
    }
    EACH_LANE(h) {
        low.of[h] = -low.of[h];
        range.of[h] += low.of[h];
    }
}

CLONES void find_most(const Batch * batches, int n_batches, float & most_low, float & most_range) {
    Lanes all_low = {}, all_range = {};
    for (int i = 0; i < n_batches; ++i) {
        Lanes low, range;
        ranges(batches[i], low, range);
        EACH_LANE(h) {
            all_low.of[h]   = most(all_low.of[h], low.of[h]);
            all_range.of[h] = most(all_range.of[h], range.of[h]);
        }
    }
    most_low   = *std::max_element(all_low.of, all_low.of + kBatch);
    most_range = *std::max_element(all_range.of, all_range.of + kBatch);
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

// What a batch becomes: numbers of steps, and levels as LowParts has them.
struct Packed {
    uint32_t scale[kBatch];
    uint32_t minimum[kBatch];
    uint32_t upper[kBatch]; // of a half: bit j of byte k is of level 4 j + k
    uint32_t lower[kBatch];
};

// The best numbers of steps so far, and their error.
struct Best {
    Lanes scale;
    Lanes minimum;
    Lanes error;

    ALWAYS_INLINE void try_steps(const Batch & x, const Steps & steps, float top, const Lanes & s, const Lanes & m) {
        Lanes d, z, inverse, sum;
        EACH_LANE(h) {
            d.of[h]       = s.of[h] * steps.scale;
            z.of[h]       = m.of[h] * steps.minimum;
            inverse.of[h] = d.of[h] > 1e-30f ? 1.0f / d.of[h] : 0.0f;
            sum.of[h]     = 0.0f;
        }
        for (int i = 0; i < kHalf; ++i) {
            EACH_LANE(h) {
                const float wrong = x[i].of[h] + z.of[h] - level_of(x[i].of[h], z.of[h], inverse.of[h], top) * d.of[h];
                sum.of[h] += wrong * wrong;
            }
        }
        EACH_LANE(h) {
            const bool better = sum.of[h] < error.of[h];
            error.of[h]       = better ? sum.of[h] : error.of[h];
            scale.of[h]       = better ? s.of[h] : scale.of[h];
            minimum.of[h]     = better ? m.of[h] : minimum.of[h];
        }
    }
};

ALWAYS_INLINE inline Lanes moved(const Lanes & steps, float by) {
    Lanes result;
    EACH_LANE(h) {
        result.of[h] = least(most(steps.of[h] + by, 0.0f), 15.0f);
    }
    return result;
}

CLONES void quantize_batch(const Batch & x, const Steps & steps, float top, Packed & packed) {
    Lanes low, range, first_scale, first_minimum;
    Best  best;
    ranges(x, low, range);
    const float inverse_scale   = steps.scale > 0.0f ? 1.0f / (top * steps.scale) : 0.0f;
    const float inverse_minimum = steps.minimum > 0.0f ? 1.0f / steps.minimum : 0.0f;
    EACH_LANE(h) {
        best.scale.of[h] = first_scale.of[h] = nearest_step(range.of[h] * inverse_scale);
        best.minimum.of[h] = first_minimum.of[h] = nearest_step(low.of[h] * inverse_minimum);
        best.error.of[h]                         = 3e38f;
    }
    // as many steps as the range of values has, then fewer and more: of few levels the best reach less far
    constexpr float kScales[] = { 0.0f, -1.0f, 1.0f, -2.0f, -3.0f };
    constexpr float kMinima[] = { 0.0f, -1.0f, 1.0f, -2.0f };
    for (int i = 0; i < (top > 3.0f ? 3 : 5); ++i) {
        for (int j = 0; j < (top > 3.0f ? 3 : 4); ++j) {
            best.try_steps(x, steps, top, moved(first_scale, kScales[i]), moved(first_minimum, kMinima[j]));
        }
    }

    Lanes z, inverse;
    EACH_LANE(h) {
        const float d     = best.scale.of[h] * steps.scale;
        z.of[h]           = best.minimum.of[h] * steps.minimum;
        inverse.of[h]     = d > 1e-30f ? 1.0f / d : 0.0f;
        packed.scale[h]   = static_cast<uint32_t>(static_cast<int>(best.scale.of[h]));
        packed.minimum[h] = static_cast<uint32_t>(static_cast<int>(best.minimum.of[h]));
        packed.upper[h] = packed.lower[h] = 0;
    }
    for (int i = 0; i < kHalf; ++i) {
        EACH_LANE(h) {
            const auto level =
                static_cast<uint32_t>(static_cast<int>(level_of(x[i].of[h], z.of[h], inverse.of[h], top)));
            packed.lower[h] |= (level & 3) << (8 * (i % 4) + 2 * (i / 4));
            packed.upper[h] |= (level >> 2) << (8 * (i % 4) + i / 4);
        }
    }
}

// A block whose first half is half h of the batch.
void store_block(ggml_type type, const Packed & packed, int h, uint8_t * numbers, uint8_t * levels) {
    numbers[0] = static_cast<uint8_t>(packed.scale[h] | packed.scale[h + 1] << 4);
    numbers[1] = static_cast<uint8_t>(packed.minimum[h] | packed.minimum[h + 1] << 4);
    if (type == kLow3) {
        const uint32_t upper = packed.upper[h] | packed.upper[h + 1] << 4;
        std::memcpy(levels, &upper, 4);
        levels += 4;
    }
    std::memcpy(levels, packed.lower + h, 8);
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
        const int64_t first     = super * kSuper;
        const int64_t end       = std::min(n, first + kSuper);
        const int     n_batches = static_cast<int>((end - first + kBatch * kHalf - 1) / (kBatch * kHalf));
        Batch         batches[kSuper / (kBatch * kHalf)];
        float         most_low, most_range;
        for (int i = 0; i < n_batches; ++i) {
            const int64_t at = first + i * kBatch * kHalf;
            load_batch(weights + at, end - at, batches[i]);
        }
        find_most(batches, n_batches, most_low, most_range);
        const Steps steps = steps_of(most_low, most_range, top);
        std::memcpy(row + 4 * super, &steps.half_scale, 2);
        std::memcpy(row + 4 * super + 2, &steps.half_minimum, 2);
        Packed packed;
        for (int64_t block = first / 32; block < end / 32; ++block) {
            const int in_batch = static_cast<int>((block - first / 32) % (kBatch / 2));
            if (in_batch == 0) {
                quantize_batch(batches[(block - first / 32) / (kBatch / 2)], steps, top, packed);
            }
            store_block(type, packed, 2 * in_batch, row + parts.scales + 2 * block,
                        row + parts.levels + parts.n_levels * block);
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
