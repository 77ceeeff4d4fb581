#include "kernels/device_levels.h"

#include "half.h"
#include "kernels/low_bits.h"
#include "vector_loops.h"

#include <algorithm>
#include <cstring>
#include <vector>

// A loop over the lanes, which the compiler makes vector code of only while it is a loop.
#if defined(__GNUC__) && !defined(__clang__)
#    define EACH_LANE(h) _Pragma("GCC unroll 1") for (int h = 0; h < kLanesOf; ++h)
#else
#    define EACH_LANE(h) for (int h = 0; h < kLanesOf; ++h)
#endif

namespace coreinfer {

namespace {

constexpr int kLanesOf   = 16; // blocks that are quantised at once, one in each lane
constexpr int kSuperOf   = 256;
constexpr int kHalfBlock = 16; // of the types of kSuperOf weights: these have a scale of their own

// The stored layouts, as ggml defines them. d and m scale; m is of the minima.
struct BlockQ2_K {
    uint8_t  scales[16]; // of a sub-block of 16: scale in the low, minimum in the high half
    uint8_t  q[64];
    uint16_t d;
    uint16_t m;
};

struct BlockQ3_K {
    uint8_t  high[32]; // bit j of byte i: the third bit of level 32 j + i
    uint8_t  q[64];
    uint8_t  scales[12]; // 16 of 6 bits
    uint16_t d;
};

struct BlockQ2_0 {
    uint16_t d;
    uint8_t  q[16]; // bits 2 j and 2 j + 1 of byte i: level 4 i + j
};

struct BlockQ4_0 {
    uint16_t d;
    uint8_t  q[16]; // value i in the low, value i + 16 in the high half of byte i
};

static_assert(sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 && sizeof(BlockQ2_0) == 18 && sizeof(BlockQ4_0) == 18,
              "the blocks must be as ggml stores them");

struct alignas(64) Lanes {
    float of[kLanesOf];
};

// Added to a small number, this leaves no place for a fraction.
constexpr float kRound = 12582912.0f;

// Below this a scale has no inverse to multiply with.
constexpr float kLeast = 1e-18f;

// A NaN gets one of the levels too.
ALWAYS_INLINE inline float bounded(float x, float least, float most) {
    const float above = x > least ? x : least;
    return above < most ? above : most;
}

ALWAYS_INLINE inline float level_of(float x, float inverse, float top) {
    return (bounded(x * inverse, -top, top - 1.0f) + kRound) - kRound;
}

// Blocks of kN weights, the weights of the same place beside each other.
template <int kN>
ALWAYS_INLINE inline void load(const float * weights, int n_blocks, Lanes (&x)[kN]) {
    for (int i = 0; i < kN; ++i) {
        for (int h = 0; h < kLanesOf; ++h) {
            x[i].of[h] = h < n_blocks ? weights[h * kN + i] : 0.0f;
        }
    }
}

// The scale of least squared error for levels from -kTop to kTop - 1, of each block. The weight that is largest in
// magnitude gets about the lowest level, which has no positive twin: of the places that are tried, the best.
template <int kN, int kTop, int kPlaces>
ALWAYS_INLINE inline Lanes fit(const Lanes (&x)[kN], const float (&places)[kPlaces]) {
    constexpr float top     = kTop;
    Lanes           largest = {}, best = {}, scale = {};
    for (int i = 0; i < kN; ++i) {
        EACH_LANE(h) {
            const float a = x[i].of[h] < 0.0f ? -x[i].of[h] : x[i].of[h];
            const float b = largest.of[h] < 0.0f ? -largest.of[h] : largest.of[h];
            largest.of[h] = a > b ? x[i].of[h] : largest.of[h];
        }
    }
    for (const float place : places) {
        Lanes inverse, xl = {}, ll = {};
        EACH_LANE(h) {
            const float to = largest.of[h] > kLeast || largest.of[h] < -kLeast ? largest.of[h] : 1e30f;
            inverse.of[h]  = -place / to;
        }
        for (int i = 0; i < kN; ++i) {
            EACH_LANE(h) {
                const float level = level_of(x[i].of[h], inverse.of[h], top);
                xl.of[h] += x[i].of[h] * level;
                ll.of[h] += level * level;
            }
        }
        EACH_LANE(h) {
            const float fitted = xl.of[h] / (ll.of[h] > 0.0f ? ll.of[h] : 1.0f);
            const float gain   = fitted * xl.of[h]; // what the squared error is less than the squared weights
            scale.of[h]        = gain > best.of[h] ? fitted : scale.of[h];
            best.of[h]         = gain > best.of[h] ? gain : best.of[h];
        }
    }
    return scale;
}

ALWAYS_INLINE inline float inverse_of(float d) {
    return d > kLeast || d < -kLeast ? 1.0f / d : 0.0f;
}

// What a half can hold.
ALWAYS_INLINE inline float storable(float x) {
    return bounded(x, -65504.0f, 65504.0f);
}

// The levels of each block, counted from zero up [kLanesOf * kN].
template <int kN>
ALWAYS_INLINE inline void levels_of(const Lanes (&x)[kN], const Lanes & scale, float top, uint8_t * levels) {
    Lanes inverse;
    EACH_LANE(h) {
        inverse.of[h] = inverse_of(scale.of[h]);
    }
    for (int i = 0; i < kN; ++i) {
        int32_t rounded[kLanesOf];
        EACH_LANE(h) {
            rounded[h] = static_cast<int32_t>(level_of(x[i].of[h], inverse.of[h], top) + top);
        }
        for (int h = 0; h < kLanesOf; ++h) {
            levels[h * kN + i] = static_cast<uint8_t>(rounded[h]);
        }
    }
}

// The low two bits of 256 levels, as both types of super-blocks have them.
inline void pack_two(const uint8_t * levels, uint8_t * q) {
    for (int half = 0; half < 2; ++half, levels += 128, q += 32) {
        for (int i = 0; i < 32; ++i) {
            q[i] = static_cast<uint8_t>((levels[i] & 3) | (levels[i + 32] & 3) << 2 | (levels[i + 64] & 3) << 4 |
                                        (levels[i + 96] & 3) << 6);
        }
    }
}

CLONES void quantize_q3_k(const float * weights, int64_t n, BlockQ3_K * to) {
    for (int64_t first = 0; first < n; first += kSuperOf, ++to) {
        Lanes x[kHalfBlock];
        load(weights + first, kLanesOf, x);
        const Lanes scale = fit<kHalfBlock, 4>(x, { 3.3f, 3.7f, 4.1f, 4.5f, 4.9f });
        float       most  = 0.0f; // in magnitude, with its sign
        for (const float s : scale.of) {
            most = s * s > most * most ? s : most;
        }
        to->d         = to_half(storable(most / -32.0f));
        const float d = from_half(to->d);
        std::memset(to->scales, 0, sizeof(to->scales));
        Lanes stored;
        for (int h = 0; h < kLanesOf; ++h) {
            const float steps = level_of(scale.of[h], inverse_of(d), 32.0f);
            const auto  bits  = static_cast<unsigned>(static_cast<int>(steps) + 32);
            stored.of[h]      = steps * d;
            to->scales[h % 8] |= static_cast<uint8_t>((bits & 15) << (h < 8 ? 0 : 4));
            to->scales[8 + h % 4] |= static_cast<uint8_t>((bits >> 4) << 2 * (h / 4));
        }
        uint8_t levels[kSuperOf];
        levels_of(x, stored, 4.0f, levels);
        pack_two(levels, to->q);
        std::memset(to->high, 0, sizeof(to->high));
        for (int i = 0; i < kSuperOf; ++i) {
            to->high[i % 32] |= static_cast<uint8_t>((levels[i] >> 2) << i / 32);
        }
    }
}

// As our own format of 2 bits has them, but for the order.
void quantize_q2_k(const float * weights, int64_t n, BlockQ2_K * to) {
    const LowParts       parts(kLow2, kSuperOf);
    std::vector<uint8_t> row(parts.size);
    for (int64_t first = 0; first < n; first += kSuperOf, ++to) {
        quantize_low_row(kLow2, weights + first, kSuperOf, row.data());
        std::memcpy(&to->d, row.data(), 2);
        std::memcpy(&to->m, row.data() + 2, 2);
        const uint8_t * numbers = row.data() + parts.scales;
        uint8_t         levels[kSuperOf];
        for (int h = 0; h < kLanesOf; ++h) {
            const int shift = h % 2 * 4;
            to->scales[h] =
                static_cast<uint8_t>((numbers[h / 2 * 2] >> shift & 15) | (numbers[h / 2 * 2 + 1] >> shift & 15) << 4);
            const uint8_t * words = row.data() + parts.levels + 4 * h;
            for (int i = 0; i < kHalfBlock; ++i) {
                levels[kHalfBlock * h + i] = words[i % 4] >> 2 * (i / 4) & 3;
            }
        }
        pack_two(levels, to->q);
    }
}

CLONES void quantize_q2_0(const float * weights, int64_t n, BlockQ2_0 * to) {
    constexpr int kN = 64;
    for (int64_t block = 0; block < n / kN; block += kLanesOf, to += kLanesOf) {
        const int n_blocks = static_cast<int>(std::min<int64_t>(kLanesOf, n / kN - block));
        Lanes     x[kN];
        load(weights + block * kN, n_blocks, x);
        Lanes scale = fit<kN, 2>(x, { 1.1f, 1.3f, 1.5f, 1.8f });
        for (int h = 0; h < n_blocks; ++h) {
            to[h].d     = to_half(storable(-scale.of[h])); // stored levels are from -1 to 2
            scale.of[h] = -from_half(to[h].d);
        }
        uint8_t levels[kLanesOf * kN];
        levels_of(x, scale, 2.0f, levels);
        for (int i = 0; i < n_blocks * kN; ++i) {
            uint8_t & q = to[i / kN].q[i % kN / 4];
            q           = static_cast<uint8_t>((i % 4 == 0 ? 0 : q) | (3 - levels[i]) << 2 * (i % 4));
        }
    }
}

CLONES void quantize_q4_0(const float * weights, int64_t n, BlockQ4_0 * to) {
    constexpr int kN = 32;
    for (int64_t block = 0; block < n / kN; block += kLanesOf, to += kLanesOf) {
        const int n_blocks = static_cast<int>(std::min<int64_t>(kLanesOf, n / kN - block));
        Lanes     x[kN];
        load(weights + block * kN, n_blocks, x);
        Lanes scale = fit<kN, 8>(x, { 7.0f, 7.5f, 8.0f, 8.5f });
        for (int h = 0; h < n_blocks; ++h) {
            to[h].d     = to_half(storable(scale.of[h]));
            scale.of[h] = from_half(to[h].d);
        }
        uint8_t levels[kLanesOf * kN];
        levels_of(x, scale, 8.0f, levels);
        for (int h = 0; h < n_blocks; ++h) {
            for (int i = 0; i < 16; ++i) {
                to[h].q[i] = static_cast<uint8_t>(levels[h * kN + i] | levels[h * kN + i + 16] << 4);
            }
        }
    }
}

} // namespace

ggml_type device_type(coreinfer_level level, int64_t n) {
    switch (level) {
        case COREINFER_LEVEL_4_BITS:
            return n % 32 == 0 ? GGML_TYPE_Q4_0 : GGML_TYPE_COUNT;
        case COREINFER_LEVEL_3_BITS:
            return n % kSuperOf == 0 ? GGML_TYPE_Q3_K : GGML_TYPE_COUNT;
        case COREINFER_LEVEL_2_BITS:
            return n % kSuperOf == 0 ? GGML_TYPE_Q2_K : n % 64 == 0 ? GGML_TYPE_Q2_0 : GGML_TYPE_COUNT;
        default:
            return GGML_TYPE_COUNT;
    }
}

void quantize_device_row(ggml_type type, const float * weights, int64_t n, uint8_t * row) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return quantize_q4_0(weights, n, reinterpret_cast<BlockQ4_0 *>(row));
        case GGML_TYPE_Q3_K:
            return quantize_q3_k(weights, n, reinterpret_cast<BlockQ3_K *>(row));
        case GGML_TYPE_Q2_K:
            return quantize_q2_k(weights, n, reinterpret_cast<BlockQ2_K *>(row));
        default:
            return quantize_q2_0(weights, n, reinterpret_cast<BlockQ2_0 *>(row));
    }
}

} // namespace coreinfer
