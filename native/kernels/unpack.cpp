// The inverse of pack_rows(), for a row: its blocks as ggml stores them, which ggml then makes values of.

#include "kernels/packed_layout.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {

namespace {

constexpr size_t kMostBytes = 210; // of a block

// n bytes of a row, of which unit stand beside each other.
void take(const uint8_t * from, int n, int unit, int64_t lane, uint8_t * to) {
    for (int j = 0; j < n; j += unit) {
        std::memcpy(to + j, from + j * kLanes + lane * unit, unit);
    }
}

// In a packed lane bit j of byte k belongs to value 4 j + k, in ggml's blocks bit i to value i.
void restore_fifth_bits(uint8_t * bits) {
    uint32_t packed;
    uint32_t stored = 0;
    std::memcpy(&packed, bits, sizeof(packed));
    for (int i = 0; i < 32; ++i) {
        stored |= (packed >> (8 * (i % 4) + i / 4) & 1) << i;
    }
    std::memcpy(bits, &stored, sizeof(stored));
}

void unpack_block(const PackedKernels & kernels, ggml_type type, const uint8_t * scales, const uint8_t * levels,
                  int64_t lane, uint8_t * block) {
    const Parts parts = parts_of(type);
    take(scales, parts.n_scales, 2, lane, block);
    if (parts.upper > 0) {
        take(levels, 4, 4, lane, block + parts.upper);
        restore_fifth_bits(block + parts.upper);
        levels += 4 * kLanes;
    }
    take(levels, parts.n_levels, 4, lane, block + parts.levels);
    if (type == GGML_TYPE_Q8_0) {
        for (int i = 0; i < parts.n_levels; ++i) {
            block[parts.levels + i] = static_cast<uint8_t>(block[parts.levels + i] - kernels.byte_offset);
        }
    }
}

// The inverse of part_levels().
void join_levels(const uint8_t * first, const uint8_t * second, uint8_t * to) {
    for (int i = 0; i < 16; ++i) {
        to[i]      = static_cast<uint8_t>((first[i] & 15) | second[i] << 4);
        to[i + 16] = static_cast<uint8_t>(first[i] >> 4 | (second[i] & 0xf0));
    }
}

// The inverse of order_super_block().
void restore_super_block(ggml_type type, const uint8_t * from, uint8_t * to) {
    const Parts parts  = parts_of(type);
    uint8_t *   levels = to + parts.levels;
    if (type == GGML_TYPE_IQ4_XS) {
        std::memcpy(to, from, 8 + 128);
        return;
    }
    if (type == GGML_TYPE_Q6_K) {
        std::memcpy(to + 208, from, 2);
        std::memcpy(to + 192, from + 2, 16);
        from += 18;
        uint32_t words[16] = {};
        for (int b = 0; b < 8; ++b, from += 8) {
            uint32_t ordered[2];
            std::memcpy(ordered, from, sizeof(ordered));
            for (int j = 0; j < 8; ++j) {
                words[b / 4 * 8 + j] |= (ordered[j / 4] >> 2 * (j % 4) & 0x03030303) << 2 * (b % 4);
            }
        }
        std::memcpy(to + parts.upper, words, sizeof(words));
        for (int n = 0; n < 2; ++n, from += 64, levels += 64) {
            join_levels(from, from + 32, levels);
            join_levels(from + 16, from + 48, levels + 32);
        }
        return;
    }
    std::memcpy(to, from, 16);
    from += 16;
    if (type == GGML_TYPE_Q5_K) {
        uint32_t words[8] = {};
        for (int b = 0; b < 8; ++b, from += 4) {
            uint32_t ordered;
            std::memcpy(&ordered, from, sizeof(ordered));
            for (int j = 0; j < 8; ++j) {
                words[j] |= (ordered >> j & 0x01010101) << b;
            }
        }
        std::memcpy(to + parts.upper, words, sizeof(words));
    }
    for (int pair = 0; pair < 4; ++pair, from += 32, levels += 32) {
        join_levels(from, from + 16, levels);
    }
}

} // namespace

void unpack_row(const PackedKernels & kernels, ggml_type type, const uint8_t * packed, int64_t row, int64_t n_in,
                float * values) {
    const auto      to_float = ggml_get_type_traits(type)->to_float;
    const int64_t   lane     = row % kLanes;
    const uint8_t * group    = packed + (row - lane) * row_size(type, n_in);
    const Parts     parts    = parts_of(type);
    uint8_t         block[kMostBytes];
    if (has_super_blocks(type)) {
        const int       size     = static_cast<int>(ggml_type_size(type));
        const int       d        = type == GGML_TYPE_Q6_K ? 2 : 0; // bytes of scales before all super-blocks
        const int       halves   = type == GGML_TYPE_Q6_K ? 0 : 4;
        const int64_t   n_blocks = n_in / 256;
        const uint8_t * rest     = group + n_blocks * d * kLanes;
        for (int64_t b = 0; b < n_blocks; ++b, group += d * kLanes, rest += (size - d) * kLanes) {
            uint8_t ordered[kMostBytes];
            take(group, d, 2, lane, ordered);
            take(rest, halves, 2, lane, ordered + d);
            take(rest + halves * kLanes, size - d - halves, 4, lane, ordered + d + halves);
            restore_super_block(type, ordered, block);
            to_float(block, values + 256 * b, 256);
        }
        return;
    }
    const int64_t n_blocks = n_in / 32;
    const int64_t n_levels = (parts.upper > 0 ? 4 : 0) + parts.n_levels;
    for (int64_t b = 0; b < n_blocks; b += 2) {
        const int64_t   n_here = std::min<int64_t>(2, n_blocks - b);
        const uint8_t * levels = group + n_here * parts.n_scales * kLanes;
        for (int64_t i = 0; i < n_here; ++i, group += parts.n_scales * kLanes, levels += n_levels * kLanes) {
            unpack_block(kernels, type, group, levels, lane, block);
            to_float(block, values + 32 * (b + i), 32);
        }
        group = levels;
    }
}

} // namespace coreinfer
