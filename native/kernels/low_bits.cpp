#include "kernels/low_bits.h"

#include "half.h"
#include "vector_loops.h"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#    include <xmmintrin.h>
#endif

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
struct alignas(64) Lanes {
    float of[kBatch];
};

// The weights of a batch: those of the same place in each half beside each other.
using Batch = Lanes[kHalf];

// What the formats keep of a super-block: scale and minimum of a half are multiples of these.
struct Steps {
    float    scale;
    float    minimum;
    float    per_scale; // steps in a scale of 1
    float    per_minimum;
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

// Loads up to a batch of the n weights. Of each half: low, the distance from its least value to zero, and range, from
// there to its largest; zero is among the values.
inline void load_batch(const float * weights, int64_t n, Batch & x, Lanes & low, Lanes & range) {
    int first = 0; // half that is not loaded
#ifdef __SSE2__
    for (; first < kBatch && (first + 4) * kHalf <= n; first += 4) {
        __m128 lowest = _mm_setzero_ps(), highest = _mm_setzero_ps();
        for (int i = 0; i < kHalf; i += 4) {
            __m128 rows[4];
            for (int j = 0; j < 4; ++j) {
                rows[j] = _mm_loadu_ps(weights + (first + j) * kHalf + i);
            }
            _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
            for (int j = 0; j < 4; ++j) {
                _mm_storeu_ps(x[i + j].of + first, rows[j]);
                lowest  = _mm_min_ps(rows[j], lowest);
                highest = _mm_max_ps(rows[j], highest);
            }
        }
        lowest = _mm_sub_ps(_mm_setzero_ps(), lowest);
        _mm_storeu_ps(low.of + first, lowest);
        _mm_storeu_ps(range.of + first, _mm_add_ps(highest, lowest));
    }
#endif
    for (int half = first; half < kBatch; ++half) {
        float lowest = 0.0f, highest = 0.0f;
        for (int i = 0; i < kHalf; ++i) {
            const float weight = half * kHalf < n ? weights[half * kHalf + i] : 0.0f;
            x[i].of[half]      = weight;
            lowest             = least(weight, lowest);
            highest            = most(weight, highest);
        }
        low.of[half]   = -lowest;
        range.of[half] = highest - lowest;
    }
}

inline float most_of(const Lanes * lanes, int n) {
    Lanes all = {};
    for (int i = 0; i < n; ++i) {
        EACH_LANE(h) {
            all.of[h] = most(all.of[h], lanes[i].of[h]);
        }
    }
    return *std::max_element(all.of, all.of + kBatch);
}

// A step whose multiples up to 15 reach this far. Half precision ends at 65504, and a step of zero divides nothing.
Steps steps_of(float most_low, float most_range, float top) {
    Steps steps;
    steps.half_scale   = to_half(std::min(most_range / (15.0f * top), 65504.0f));
    steps.half_minimum = to_half(std::min(most_low / 15.0f, 65504.0f));
    steps.scale        = from_half(steps.half_scale);
    steps.minimum      = from_half(steps.half_minimum);
    steps.per_scale    = steps.scale > 0.0f ? 1.0f / steps.scale : 0.0f;
    steps.per_minimum  = steps.minimum > 0.0f ? 1.0f / steps.minimum : 0.0f;
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
    uint32_t four[kHalf / 4][kBatch]; // of 4 bits: byte k of word j is level 4 j + k
};

// Other numbers of steps, none where there are none.
ALWAYS_INLINE inline Lanes moved(const Lanes & steps, float by) {
    Lanes result;
    EACH_LANE(h) {
        result.of[h] = least(most(steps.of[h] + by, least(steps.of[h], 1.0f)), 15.0f);
    }
    return result;
}

// Added to a small number, this leaves no place for a fraction.
constexpr float kRound = 12582912.0f;

// The best numbers of steps so far, and their error.
struct Best {
    Lanes scale;
    Lanes minimum;
    Lanes error;

    // Tries this number of steps of the scale with some of the minimum, from first on. Errors are counted in scales:
    // one product for each weight, and none for each minimum.
    template <int kMinima>
    ALWAYS_INLINE void try_scale(const Batch & x, const Steps & steps, float top, const Lanes & s, const Lanes & first,
                                 const float (&by)[kMinima]) {
        Lanes unit, inverse, most_level, m[kMinima], zero[kMinima], sum[kMinima];
        EACH_LANE(h) {
            const float d    = s.of[h] * steps.scale;
            unit.of[h]       = d > 0.0f ? d : 1.0f;
            inverse.of[h]    = 1.0f / unit.of[h];
            most_level.of[h] = d > 0.0f ? top : 0.0f;
        }
        for (int j = 0; j < kMinima; ++j) {
            m[j] = moved(first, by[j]);
            EACH_LANE(h) {
                zero[j].of[h] = m[j].of[h] * steps.minimum * inverse.of[h];
                sum[j].of[h]  = 0.0f;
            }
        }
        for (int i = 0; i < kHalf; ++i) {
            EACH_LANE(h) {
                const float in_scales = x[i].of[h] * inverse.of[h];
                for (int j = 0; j < kMinima; ++j) {
                    const float exact = in_scales + zero[j].of[h];
                    const float level = (least(most(exact, 0.0f), most_level.of[h]) + kRound) - kRound;
                    sum[j].of[h] += (exact - level) * (exact - level);
                }
            }
        }
        for (int j = 0; j < kMinima; ++j) {
            EACH_LANE(h) {
                const float wrong  = sum[j].of[h] * unit.of[h] * unit.of[h];
                const bool  better = wrong < error.of[h];
                error.of[h]        = better ? wrong : error.of[h];
                scale.of[h]        = better ? s.of[h] : scale.of[h];
                minimum.of[h]      = better ? m[j].of[h] : minimum.of[h];
            }
        }
    }

    // Gives the weights levels by a part of their range, and takes the scale and the minimum of least squared error for
    // these levels, rounded to steps.
    ALWAYS_INLINE void fit(const Batch & x, const Lanes & sum, const Steps & steps, float top, const Lanes & low,
                           const Lanes & range, float part_of_range, float part_of_low) {
        Lanes start, inverse, zero, q = {}, qq = {}, qx = {};
        EACH_LANE(h) {
            start.of[h]   = range.of[h] * part_of_range / top;
            inverse.of[h] = start.of[h] > 0.0f ? 1.0f / start.of[h] : 0.0f;
            zero.of[h]    = low.of[h] * part_of_low * inverse.of[h];
        }
        for (int i = 0; i < kHalf; ++i) {
            EACH_LANE(h) {
                const float exact = x[i].of[h] * inverse.of[h] + zero.of[h];
                const float level = (least(most(exact, 0.0f), top) + kRound) - kRound;
                q.of[h] += level;
                qq.of[h] += level * level;
                qx.of[h] += level * x[i].of[h];
            }
        }
        EACH_LANE(h) {
            const float spread = kHalf * qq.of[h] - q.of[h] * q.of[h]; // none if all levels are the same
            const float fitted = (kHalf * qx.of[h] - q.of[h] * sum.of[h]) / (spread > 0.0f ? spread : 1.0f);
            const float s      = nearest_step(most(spread > 0.0f ? fitted : start.of[h], 0.0f) * steps.per_scale);
            const float d      = s * steps.scale;
            const float m      = nearest_step(most(d * q.of[h] - sum.of[h], 0.0f) * (1.0f / kHalf) * steps.per_minimum);
            const float z      = m * steps.minimum;
            // less the sum of the squared weights
            const float wrong =
                z * (kHalf * z + 2.0f * sum.of[h]) + d * (d * qq.of[h] - 2.0f * (qx.of[h] + z * q.of[h]));
            const bool better = wrong < error.of[h];
            error.of[h]       = better ? wrong : error.of[h];
            scale.of[h]       = better ? s : scale.of[h];
            minimum.of[h]     = better ? m : minimum.of[h];
        }
    }
};

CLONES void quantize_batch(const Batch & x, const Lanes & low, const Lanes & range, const Steps & steps, float top,
                           Packed & packed) {
    Lanes first_scale, first_minimum;
    Best  best;
    EACH_LANE(h) {
        best.scale.of[h] = first_scale.of[h] = nearest_step(range.of[h] / top * steps.per_scale);
        best.minimum.of[h] = first_minimum.of[h] = nearest_step(low.of[h] * steps.per_minimum);
        best.error.of[h]                         = 3e38f;
    }
    // The best reach less far than the range of values. In the order in which each saves the most error of what is
    // left, on the FFN weights of SmolLM2; more than these save less than 1 %.
    if (top > 3.0f) {
        best.try_scale(x, steps, top, first_scale, first_minimum, { 0.0f, -1.0f, 1.0f });
        best.try_scale(x, steps, top, moved(first_scale, -1.0f), first_minimum, { 0.0f, -1.0f });
    } else {
        Lanes sum = {};
        for (int i = 0; i < kHalf; ++i) {
            EACH_LANE(h) {
                sum.of[h] += x[i].of[h];
            }
        }
        best.fit(x, sum, steps, top, low, range, 0.8f, 0.8f);
        best.fit(x, sum, steps, top, low, range, 0.8f, 0.9f);
        best.fit(x, sum, steps, top, low, range, 0.9f, 0.75f);
        best.fit(x, sum, steps, top, low, range, 0.9f, 1.1f);
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
    const auto level_at = [&](int i, int h) {
        return static_cast<int>(level_of(x[i].of[h], z.of[h], inverse.of[h], top));
    };
    if (top > 7.0f) {
        for (int i = 0; i < kHalf; ++i) {
            EACH_LANE(h) {
                const uint32_t before = i % 4 == 0 ? 0 : packed.four[i / 4][h];
                packed.four[i / 4][h] = before | static_cast<uint32_t>(level_at(i, h)) << 8 * (i % 4);
            }
        }
        return;
    }
    for (int i = 0; i < kHalf; ++i) {
        EACH_LANE(h) {
            const auto level = static_cast<uint32_t>(level_at(i, h));
            packed.lower[h] |= (level & 3) << (8 * (i % 4) + 2 * (i / 4));
            packed.upper[h] |= (level >> 2) << (8 * (i % 4) + i / 4);
        }
    }
}

// A block whose first half is half h of the batch.
inline void store_block(ggml_type type, const Packed & packed, int h, uint8_t * numbers, uint8_t * levels) {
    numbers[0] = static_cast<uint8_t>(packed.scale[h] | packed.scale[h + 1] << 4);
    numbers[1] = static_cast<uint8_t>(packed.minimum[h] | packed.minimum[h + 1] << 4);
    if (type == kLow4) {
        for (int j = 0; j < kHalf / 4; ++j) {
            const uint32_t word = packed.four[j][h] | packed.four[j][h + 1] << 4;
            std::memcpy(levels + 4 * j, &word, 4);
        }
        return;
    }
    if (type == kLow3) {
        const uint32_t upper = packed.upper[h] | packed.upper[h + 1] << 4;
        std::memcpy(levels, &upper, 4);
        levels += 4;
    }
    std::memcpy(levels, packed.lower + h, 8);
}

int unpack_level(ggml_type type, const uint8_t * from, int i) {
    if (type == kLow4) {
        return from[i % 16] >> i / 16 * 4 & 15;
    }
    const int k     = i % 4;
    const int upper = type == kLow3 ? (from[k] >> i / 4 & 1) << 2 : 0;
    from += type == kLow3 ? 4 : 0;
    return upper | (from[4 * (i / 16) + k] >> 2 * (i / 4 % 4) & 3);
}

} // namespace

void quantize_low_row(ggml_type type, const float * weights, int64_t n, uint8_t * row) {
    const LowParts parts(type, n);
    const float    top = type == kLow4 ? 15.0f : type == kLow3 ? 7.0f : 3.0f;
    std::memset(row + parts.scales, 0, parts.levels - parts.scales); // an odd number of blocks leaves some
    for (int64_t super = 0; super < parts.n_supers; ++super) {
        const int64_t first     = super * kSuper;
        const int64_t end       = std::min(n, first + kSuper);
        const int     n_batches = static_cast<int>((end - first + kBatch * kHalf - 1) / (kBatch * kHalf));
        constexpr int kBatches  = kSuper / (kBatch * kHalf);
        Batch         batches[kBatches];
        Lanes         low[kBatches], range[kBatches];
        for (int i = 0; i < n_batches; ++i) {
            const int64_t at = first + i * kBatch * kHalf;
            load_batch(weights + at, end - at, batches[i], low[i], range[i]);
        }
        const Steps steps = steps_of(most_of(low, n_batches), most_of(range, n_batches), top);
        std::memcpy(row + 4 * super, &steps.half_scale, 2);
        std::memcpy(row + 4 * super + 2, &steps.half_minimum, 2);
        uint8_t * numbers = row + parts.scales + first / 16;
        uint8_t * levels  = row + parts.levels + first / 32 * parts.n_levels;
        for (int i = 0; i < n_batches; ++i) {
            Packed packed;
            quantize_batch(batches[i], low[i], range[i], steps, top, packed);
            const int64_t n_halves = std::min<int64_t>(kBatch, (end - first) / kHalf - i * kBatch);
            for (int h = 0; h < n_halves; h += 2, numbers += 2, levels += parts.n_levels) {
                store_block(type, packed, h, numbers, levels);
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
