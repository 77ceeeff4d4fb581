#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace test {

bool has_blocks_of_32(ggml_type type) {
    return type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q5_1 ||
           type == GGML_TYPE_Q8_0;
}

static bool has_minimum(ggml_type type) {
    return type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1;
}

static bool has_fifth_bit(ggml_type type) {
    return type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q5_1;
}

Block reference_block(ggml_type type, const float * values) {
    const float lowest  = *std::min_element(values, values + 32);
    const float highest = *std::max_element(values, values + 32);
    const bool  five    = has_fifth_bit(type);
    float       scale   = 0.0f;
    float       minimum = 0.0f;
    int         bottom  = 0;
    int         top     = five ? 31 : 15;
    if (type == GGML_TYPE_Q8_0) {
        scale  = (-lowest > highest ? -lowest : highest) / 127.0f;
        bottom = -127;
        top    = 127;
    } else if (has_minimum(type)) {
        minimum = lowest;
        scale   = (highest - lowest) / static_cast<float>(top);
    } else {
        bottom = five ? -16 : -8;
        top    = five ? 15 : 7;
        scale  = (-lowest > highest ? lowest : highest) / static_cast<float>(bottom);
    }
    Block block   = {};
    block.scale   = ggml_fp32_to_fp16(scale);
    block.minimum = has_minimum(type) ? ggml_fp32_to_fp16(minimum) : 0;
    // levels are chosen with the scale before it is rounded; one below 2^-126 is stored as zero anyway
    const float inverse = std::fabs(scale) >= 0x1p-126f ? 1.0f / scale : 0.0f;
    for (int i = 0; i < 32; ++i) {
        const float exact = (values[i] - minimum) * inverse;
        block.exact[i]    = exact;
        // the levels are made positive before they are rounded
        const float positive = std::floor(exact + (static_cast<float>(-bottom) + 0.5f));
        block.level[i]       = std::clamp(static_cast<int>(positive) + bottom, bottom, top);
        if (type == GGML_TYPE_Q8_0) {
            block.level[i] = static_cast<int>(std::nearbyint(exact));
        }
    }
    return block;
}

void store_block(ggml_type type, const Block & block, uint8_t * bytes) {
    std::memcpy(bytes, &block.scale, 2);
    bytes += 2;
    if (has_minimum(type)) {
        std::memcpy(bytes, &block.minimum, 2);
        bytes += 2;
    }
    if (type == GGML_TYPE_Q8_0) {
        for (int i = 0; i < 32; ++i) {
            bytes[i] = static_cast<uint8_t>(block.level[i]);
        }
        return;
    }
    const int offset = type == GGML_TYPE_Q4_0 ? 8 : type == GGML_TYPE_Q5_0 ? 16 : 0;
    if (has_fifth_bit(type)) {
        std::fill_n(bytes, 4, uint8_t(0));
        for (int i = 0; i < 32; ++i) {
            bytes[i / 8] = static_cast<uint8_t>(bytes[i / 8] | ((block.level[i] + offset) / 16) << (i % 8));
        }
        bytes += 4;
    }
    for (int i = 0; i < 16; ++i) {
        const int low  = (block.level[i] + offset) % 16;
        const int high = (block.level[i + 16] + offset) % 16;
        bytes[i]       = static_cast<uint8_t>(low + 16 * high);
    }
}

Block load_block(ggml_type type, const uint8_t * bytes) {
    Block block = {};
    std::memcpy(&block.scale, bytes, 2);
    bytes += 2;
    if (has_minimum(type)) {
        std::memcpy(&block.minimum, bytes, 2);
        bytes += 2;
    }
    const int       offset = type == GGML_TYPE_Q4_0 ? 8 : type == GGML_TYPE_Q5_0 ? 16 : 0;
    const uint8_t * q      = has_fifth_bit(type) ? bytes + 4 : bytes;
    for (int i = 0; i < 32; ++i) {
        if (type == GGML_TYPE_Q8_0) {
            block.level[i] = static_cast<int8_t>(bytes[i]);
            continue;
        }
        const int four = i < 16 ? q[i] % 16 : q[i - 16] / 16;
        const int bit  = has_fifth_bit(type) ? (bytes[i / 8] >> (i % 8)) & 1 : 0;
        block.level[i] = four + 16 * bit - offset;
    }
    return block;
}

std::vector<uint8_t> reference_row(ggml_type type, const std::vector<float> & values) {
    const auto           n = static_cast<int64_t>(values.size());
    std::vector<uint8_t> row(ggml_row_size(type, n));
    switch (type) {
        case GGML_TYPE_F32:
            std::memcpy(row.data(), values.data(), row.size());
            break;
        case GGML_TYPE_F16:
            for (int64_t i = 0; i < n; ++i) {
                const ggml_fp16_t half = ggml_fp32_to_fp16(values[i]);
                std::memcpy(row.data() + 2 * i, &half, 2);
            }
            break;
        case GGML_TYPE_BF16:
            for (int64_t i = 0; i < n; ++i) {
                const ggml_bf16_t half = ggml_fp32_to_bf16(values[i]);
                std::memcpy(row.data() + 2 * i, &half, 2);
            }
            break;
        default:
            for (int64_t b = 0; b < n / 32; ++b) {
                store_block(type, reference_block(type, values.data() + 32 * b), row.data() + b * ggml_type_size(type));
            }
    }
    return row;
}

bool holds_values(ggml_type type, const uint8_t * row, const std::vector<float> & values) {
    if (!has_blocks_of_32(type)) {
        return std::memcmp(row, reference_row(type, values).data(), ggml_row_size(type, values.size())) == 0;
    }
    const auto same_half = [](uint16_t a, uint16_t b) { return a == b || ((a | b) & 0x7fff) == 0; };
    for (size_t at = 0; at < values.size(); at += 32, row += ggml_type_size(type)) {
        const Block got      = load_block(type, row);
        const Block expected = reference_block(type, values.data() + at);
        if (!same_half(got.scale, expected.scale) || !same_half(got.minimum, expected.minimum)) {
            return false;
        }
        for (int i = 0; i < ((got.scale & 0x7fff) ? 32 : 0); ++i) {
            // a fused multiply and add can tip a value that lies between two levels
            const bool between = std::fabs(std::fabs(expected.exact[i] - got.level[i]) - 0.5f) < 1e-4f;
            if (got.level[i] != expected.level[i] && !between) {
                return false;
            }
        }
    }
    return true;
}

std::vector<float> row_values(ggml_type type, const void * bytes, int64_t n) {
    std::vector<float> values(n);
    if (type == GGML_TYPE_F32) {
        std::memcpy(values.data(), bytes, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(bytes, values.data(), n);
    }
    return values;
}

} // namespace test
