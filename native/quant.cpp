#include "quant.h"

#include "error.h"
#include "half.h"
#include "vector_loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace coreinfer {

// The stored layout of the types with a block of 32, as ggml defines them: d scales, m is the minimum.
struct BlockQ4_0 {
    uint16_t d;
    uint8_t  q[16]; // value i in the low, value i + 16 in the high half of byte i
};

struct BlockQ4_1 {
    uint16_t d;
    uint16_t m;
    uint8_t  q[16];
};

struct BlockQ5_0 {
    uint16_t d;
    uint8_t  high[4]; // bit i: the fifth bit of value i
    uint8_t  q[16];
};

struct BlockQ5_1 {
    uint16_t d;
    uint16_t m;
    uint8_t  high[4];
    uint8_t  q[16];
};

struct BlockQ8_0 {
    uint16_t d;
    int8_t   q[32];
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 &&
                  sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34,
              "the blocks must be as ggml stores them");

// The super-blocks of 256 that common files hold: 8 or 16 sub-blocks with scales of their own.
struct BlockQ4_K {
    uint16_t d;
    uint16_t m;
    uint8_t  scales[12]; // 8 pairs of 6-bit scale and minimum
    uint8_t  q[128];
};

struct BlockQ6_K {
    uint8_t  low[128];
    uint8_t  high[64];
    int8_t   scales[16];
    uint16_t d;
};

static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ6_K) == 210, "the blocks must be as ggml stores them");

ggml_type column_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
            return type;
        default:
            break;
    }
    // the smallest with as many bits as the source has
    const double bits = 8.0 * ggml_type_size(type) / ggml_blck_size(type);
    if (bits <= 4.5) {
        return GGML_TYPE_Q4_0;
    }
    if (bits <= 5.0) {
        return GGML_TYPE_Q4_1;
    }
    return bits <= 6.0 ? GGML_TYPE_Q5_1 : GGML_TYPE_Q8_0;
}

CLONES static void dequantize_q4_0(const BlockQ4_0 * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, dst += 32) {
        const float d = from_half(src[b].d);
        for (int i = 0; i < 16; ++i) {
            dst[i]      = d * static_cast<float>((src[b].q[i] & 15) - 8);
            dst[i + 16] = d * static_cast<float>((src[b].q[i] >> 4) - 8);
        }
    }
}

CLONES static void dequantize_q4_1(const BlockQ4_1 * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, dst += 32) {
        const float d = from_half(src[b].d);
        const float m = from_half(src[b].m);
        for (int i = 0; i < 16; ++i) {
            dst[i]      = d * static_cast<float>(src[b].q[i] & 15) + m;
            dst[i + 16] = d * static_cast<float>(src[b].q[i] >> 4) + m;
        }
    }
}

// Always inline, so that each clone below has a version of its own.
template <bool kOffset, typename Block>
ALWAYS_INLINE static inline void dequantize_q5(const Block * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, dst += 32) {
        const float d = from_half(src[b].d);
        uint32_t    high;
        std::memcpy(&high, src[b].high, sizeof(high));
        for (int i = 0; i < 16; ++i) {
            const int low_half  = (src[b].q[i] & 15) | (high >> i & 1) << 4;
            const int high_half = (src[b].q[i] >> 4) | (high >> (i + 16) & 1) << 4;
            if constexpr (kOffset) {
                const float m = from_half(src[b].m);
                dst[i]        = d * static_cast<float>(low_half) + m;
                dst[i + 16]   = d * static_cast<float>(high_half) + m;
            } else {
                dst[i]      = d * static_cast<float>(low_half - 16);
                dst[i + 16] = d * static_cast<float>(high_half - 16);
            }
        }
    }
}

CLONES static void dequantize_q5_0(const BlockQ5_0 * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    dequantize_q5<false>(src, dst, n_blocks);
}

CLONES static void dequantize_q5_1(const BlockQ5_1 * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    dequantize_q5<true>(src, dst, n_blocks);
}

CLONES static void dequantize_q8_0(const BlockQ8_0 * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, dst += 32) {
        const float d = from_half(src[b].d);
        for (int i = 0; i < 32; ++i) {
            dst[i] = d * static_cast<float>(src[b].q[i]);
        }
    }
}

CLONES static void dequantize_q4_k(const BlockQ4_K * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b) {
        const float     d      = from_half(src[b].d);
        const float     m      = from_half(src[b].m);
        const uint8_t * scales = src[b].scales;
        for (int pair = 0; pair < 4; ++pair, dst += 64) {
            float scale[2], minimum[2];
            for (int half = 0; half < 2; ++half) {
                const int j = 2 * pair + half;
                // the first four are stored whole; of the others the upper bits are in the bytes of the first
                const int s   = j < 4 ? scales[j] & 63 : (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4;
                const int min = j < 4 ? scales[j + 4] & 63 : (scales[j + 4] >> 4) | (scales[j] >> 6) << 4;
                scale[half]   = d * static_cast<float>(s);
                minimum[half] = m * static_cast<float>(min);
            }
            const uint8_t * q = src[b].q + 32 * pair;
            for (int i = 0; i < 32; ++i) {
                dst[i]      = scale[0] * static_cast<float>(q[i] & 15) - minimum[0];
                dst[i + 32] = scale[1] * static_cast<float>(q[i] >> 4) - minimum[1];
            }
        }
    }
}

CLONES static void dequantize_q6_k(const BlockQ6_K * RESTRICT src, float * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b) {
        const float d = from_half(src[b].d);
        for (int half = 0; half < 2; ++half) {
            const uint8_t * low  = src[b].low + 64 * half;
            const uint8_t * high = src[b].high + 32 * half;
            for (int quarter = 0; quarter < 4; ++quarter, dst += 32) {
                const int8_t *  scales = src[b].scales + 8 * half + 2 * quarter;
                const uint8_t * q      = low + 32 * (quarter & 1);
                for (int part = 0; part < 2; ++part) {
                    const float scale = d * static_cast<float>(scales[part]);
                    for (int i = 16 * part; i < 16 * part + 16; ++i) {
                        const int bits = ((q[i] >> (quarter & 2 ? 4 : 0)) & 15) | ((high[i] >> 2 * quarter) & 3) << 4;
                        dst[i]         = scale * static_cast<float>(bits - 32);
                    }
                }
            }
        }
    }
}

CLONES static void half_to_float(const uint16_t * RESTRICT src, float * RESTRICT dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        dst[i] = from_half(src[i]);
    }
}

CLONES static void float_to_half(const float * RESTRICT src, uint16_t * RESTRICT dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        dst[i] = to_half(src[i]);
    }
}

void dequantize_row(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:
            std::memcpy(dst, src, n * sizeof(float));
            break;
        case GGML_TYPE_F16:
            half_to_float(static_cast<const uint16_t *>(src), dst, n);
            break;
        case GGML_TYPE_Q4_0:
            dequantize_q4_0(static_cast<const BlockQ4_0 *>(src), dst, n / 32);
            break;
        case GGML_TYPE_Q4_1:
            dequantize_q4_1(static_cast<const BlockQ4_1 *>(src), dst, n / 32);
            break;
        case GGML_TYPE_Q5_0:
            dequantize_q5_0(static_cast<const BlockQ5_0 *>(src), dst, n / 32);
            break;
        case GGML_TYPE_Q5_1:
            dequantize_q5_1(static_cast<const BlockQ5_1 *>(src), dst, n / 32);
            break;
        case GGML_TYPE_Q8_0:
            dequantize_q8_0(static_cast<const BlockQ8_0 *>(src), dst, n / 32);
            break;
        case GGML_TYPE_Q4_K:
            dequantize_q4_k(static_cast<const BlockQ4_K *>(src), dst, n / 256);
            break;
        case GGML_TYPE_Q6_K:
            dequantize_q6_k(static_cast<const BlockQ6_K *>(src), dst, n / 256);
            break;
        default:
            ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

// Of a scale; 0 for one so small that it has no finite inverse, which is stored as zero anyway.
static inline float inverse(float d) {
    return d >= 0x1p-126f || d <= -0x1p-126f ? 1.0f / d : 0.0f;
}

static inline void extremes(const float * x, float & low, float & high) {
    low = high = x[0];
    for (int i = 0; i < 32; ++i) {
        low  = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
}

// The extremes and scales of a batch of blocks: worked out together, they too are vector code.
constexpr int kBatch = 16;

struct Scales {
    float    low[kBatch]  = {};
    float    high[kBatch] = {};
    float    inverse[kBatch];
    uint16_t half_d[kBatch];
    uint16_t half_low[kBatch];
};

static inline void finish(Scales & scales, const float * d) {
    for (int i = 0; i < kBatch; ++i) {
        scales.inverse[i]  = inverse(d[i]);
        scales.half_d[i]   = to_half(d[i]);
        scales.half_low[i] = to_half(scales.low[i]);
    }
}

static inline void find_extremes(const float * src, int n, Scales & scales) {
    for (int i = 0; i < n; ++i) {
        extremes(src + 32 * i, scales.low[i], scales.high[i]);
    }
}

// Of the two extremes the larger in magnitude is given the lowest level, which has no positive twin.
static inline void signed_scales(const float * src, int n, float levels, Scales & scales) {
    find_extremes(src, n, scales);
    float d[kBatch];
    for (int i = 0; i < kBatch; ++i) {
        d[i] = (-scales.low[i] > scales.high[i] ? scales.low[i] : scales.high[i]) / -levels;
    }
    finish(scales, d);
}

// From the lowest to the highest in even steps.
static inline void offset_scales(const float * src, int n, float levels, Scales & scales) {
    find_extremes(src, n, scales);
    float d[kBatch];
    for (int i = 0; i < kBatch; ++i) {
        d[i] = (scales.high[i] - scales.low[i]) / levels;
    }
    finish(scales, d);
}

// level[i] = (x[i] - low) * scale + offset, rounded down. It is never negative; what rounding errors put
// above top is clamped before the conversion, which is undefined for large values.
static inline void levels_of(const float * x, float low, float scale, float offset, float top, uint8_t * level) {
    for (int i = 0; i < 32; ++i) {
        const float value = (x[i] - low) * scale + offset;
        level[i]          = static_cast<uint8_t>(static_cast<int>(value < top ? value : top));
    }
}

// The low four bits of 32 levels.
static inline void pack_four(const uint8_t * level, uint8_t * q) {
    for (int i = 0; i < 16; ++i) {
        q[i] = static_cast<uint8_t>((level[i] & 15) | level[i + 16] << 4);
    }
}

// Their fifth bits.
static inline void pack_fifth(const uint8_t * level, uint8_t * high) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) {
        bits |= static_cast<uint32_t>(level[i] >> 4) << i;
    }
    for (int i = 0; i < 4; ++i) {
        high[i] = static_cast<uint8_t>(bits >> 8 * i);
    }
}

CLONES static void quantize_q8_0(const float * RESTRICT src, BlockQ8_0 * RESTRICT dst, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, src += 32) {
        float low, high;
        extremes(src, low, high);
        const float d  = (-low > high ? -low : high) / 127.0f;
        const float id = inverse(d);
        dst[b].d       = to_half(d);
        for (int i = 0; i < 32; ++i) {
            dst[b].q[i] = static_cast<int8_t>(nearest(src[i] * id));
        }
    }
}

// kBits: of a level, 4 or 5. With an offset (Block::m) the levels count up from the lowest value, without
// one they are centred on zero. Always inline, so that each clone below has a version of its own.
template <int kBits, bool kOffset, typename Block>
ALWAYS_INLINE static inline void quantize_blocks(const float * RESTRICT src, Block * RESTRICT dst, int64_t n_blocks) {
    constexpr float kTop    = (1 << kBits) - 1;
    constexpr float kCentre = 1 << (kBits - 1);
    for (int64_t first = 0; first < n_blocks; first += kBatch, src += 32 * kBatch, dst += kBatch) {
        const int n = static_cast<int>(std::min<int64_t>(kBatch, n_blocks - first));
        Scales    scales;
        if constexpr (kOffset) {
            offset_scales(src, n, kTop, scales);
        } else {
            signed_scales(src, n, kCentre, scales);
        }
        for (int i = 0; i < n; ++i) {
            uint8_t level[32];
            levels_of(src + 32 * i, kOffset ? scales.low[i] : 0.0f, scales.inverse[i], kOffset ? 0.5f : kCentre + 0.5f,
                      kTop, level);
            dst[i].d = scales.half_d[i];
            if constexpr (kOffset) {
                dst[i].m = scales.half_low[i];
            }
            pack_four(level, dst[i].q);
            if constexpr (kBits == 5) {
                pack_fifth(level, dst[i].high);
            }
        }
    }
}

CLONES static void quantize_q4_0(const float * RESTRICT src, BlockQ4_0 * RESTRICT dst, int64_t n_blocks) {
    quantize_blocks<4, false>(src, dst, n_blocks);
}

CLONES static void quantize_q4_1(const float * RESTRICT src, BlockQ4_1 * RESTRICT dst, int64_t n_blocks) {
    quantize_blocks<4, true>(src, dst, n_blocks);
}

CLONES static void quantize_q5_0(const float * RESTRICT src, BlockQ5_0 * RESTRICT dst, int64_t n_blocks) {
    quantize_blocks<5, false>(src, dst, n_blocks);
}

CLONES static void quantize_q5_1(const float * RESTRICT src, BlockQ5_1 * RESTRICT dst, int64_t n_blocks) {
    quantize_blocks<5, true>(src, dst, n_blocks);
}

void quantize_row(ggml_type type, const float * src, void * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:
            std::memcpy(dst, src, n * sizeof(float));
            break;
        case GGML_TYPE_F16:
            float_to_half(src, static_cast<uint16_t *>(dst), n);
            break;
        case GGML_TYPE_BF16:
            ggml_fp32_to_bf16_row(src, static_cast<ggml_bf16_t *>(dst), n);
            break;
        case GGML_TYPE_Q8_0:
            quantize_q8_0(src, static_cast<BlockQ8_0 *>(dst), n / 32);
            break;
        case GGML_TYPE_Q4_0:
            quantize_q4_0(src, static_cast<BlockQ4_0 *>(dst), n / 32);
            break;
        case GGML_TYPE_Q4_1:
            quantize_q4_1(src, static_cast<BlockQ4_1 *>(dst), n / 32);
            break;
        case GGML_TYPE_Q5_0:
            quantize_q5_0(src, static_cast<BlockQ5_0 *>(dst), n / 32);
            break;
        case GGML_TYPE_Q5_1:
            quantize_q5_1(src, static_cast<BlockQ5_1 *>(dst), n / 32);
            break;
        default:
            throw Error(COREINFER_INTERNAL, std::string("no column type: ") + ggml_type_name(type));
    }
}

CLONES void gather(const float * RESTRICT src, const int32_t * RESTRICT index, float * RESTRICT dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        dst[i] = src[index[i]];
    }
}

CLONES float dot(const float * a, const float * b, int64_t n) {
    float   lanes[16] = {};
    int64_t i         = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            lanes[j] += a[i + j] * b[i + j];
        }
    }
    float sum = 0.0f;
    for (; i < n; ++i) {
        sum += a[i] * b[i];
    }
    for (float lane : lanes) {
        sum += lane;
    }
    return sum;
}

CLONES void add_squares(const float * RESTRICT x, float * RESTRICT acc, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        acc[i] += x[i] * x[i];
    }
}

} // namespace coreinfer
