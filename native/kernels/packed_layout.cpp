#include "kernels/packed_layout.h"

#include "vector_loops.h"

#ifdef COREINFER_PACKED_AVX2
#    include "kernels/x86_features.h"
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#ifdef COREINFER_PACKED_DOTPROD
#    include <asm/hwcap.h>
#    include <sys/auxv.h>
#    ifndef HWCAP2_I8MM // headers of Linux before 5.6
#        define HWCAP2_I8MM (1 << 13)
#    endif
#endif

namespace coreinfer {

std::vector<const PackedKernels *> packed_kernels() {
    std::vector<const PackedKernels *> found;
#ifdef COREINFER_PACKED_AVX2
    const X86Features processor;
#endif
#ifdef COREINFER_PACKED_AVX512VNNI
    if (processor.avx512vnni) {
        found.push_back(packed_kernels_avx512vnni());
    }
#endif
#ifdef COREINFER_PACKED_AVX512
    if (processor.avx512) {
        found.push_back(packed_kernels_avx512());
    }
#endif
#ifdef COREINFER_PACKED_AVXVNNI
    if (processor.avxvnni) {
        found.push_back(packed_kernels_avxvnni());
    }
#endif
#ifdef COREINFER_PACKED_AVX2
    if (processor.avx2) {
        found.push_back(packed_kernels_avx2());
    }
#endif
#ifdef COREINFER_PACKED_I8MM
    if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) {
        found.push_back(packed_kernels_i8mm());
    }
#endif
#ifdef COREINFER_PACKED_DOTPROD
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        found.push_back(packed_kernels_dotprod());
    }
#endif
#ifdef COREINFER_PACKED_NEON
    found.push_back(packed_kernels_neon()); // every 64-bit ARM has NEON
#endif
    return found;
}

const PackedKernels * chosen_kernels() {
    static const PackedKernels * const chosen = []() -> const PackedKernels * {
        const char *      wanted = std::getenv("COREINFER_KERNELS");
        const std::string name   = wanted ? wanted : "";
        for (const PackedKernels * found : packed_kernels()) {
            if (name.empty() || name == found->name) {
                return found;
            }
        }
        return nullptr;
    }();
    return chosen;
}

bool has_layout(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ4_XS:
            return true;
        default:
            return false;
    }
}

int32_t level_offset(const PackedKernels & kernels, ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return 8;
        case GGML_TYPE_Q5_0:
            return 16;
        case GGML_TYPE_Q6_K:
            return 32;
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_IQ4_XS:
            return kernels.byte_offset;
        default:
            return 0;
    }
}

//
// activations
//

QuantizedTokens::QuantizedTokens(void * memory, int64_t n_tokens, int64_t n_in) : n_tokens_(n_tokens), n_in_(n_in) {
    const int64_t n_blocks = n_tokens * n_in / 32;
    blocks_.values         = static_cast<int8_t *>(memory);
    blocks_.scales         = reinterpret_cast<float *>(blocks_.values + 32 * n_blocks);
    blocks_.sums           = blocks_.scales + n_blocks;
    blocks_.starts         = reinterpret_cast<int32_t *>(blocks_.sums + n_blocks);
    blocks_.halves         = blocks_.starts + n_blocks;
}

size_t QuantizedTokens::size(int64_t n_tokens, int64_t n_in) {
    return GGML_PAD(static_cast<size_t>(n_tokens * (n_in / 32) * (32 + 5 * 4)), 64);
}

void QuantizedTokens::quantize(const PackedKernels & kernels, ggml_type type, int64_t token, const float * x) const {
    const Tile tile = tile_of(token, n_tokens_, kernels.tile);
    kernels.quantize(x, n_in_, level_offset(kernels, type), token - tile.first, tile.width,
                     blocks_.from(tile.first * (n_in_ / 32)));
}

QuantizedInput QuantizedTokens::input(int64_t first, int64_t n) const {
    return { { blocks_.values, blocks_.scales, blocks_.starts, blocks_.sums, blocks_.halves }, n, n_in_, first };
}

//
// packing
//

// The same n bytes of each row of a group, by four beside each other.
static void interleave(const uint8_t * from, size_t row_size, int n, uint8_t * to) {
    for (int j = 0; j < n; j += 4) {
        for (int64_t lane = 0; lane < kLanes; ++lane, to += 4) {
            std::memcpy(to, from + lane * row_size + j, 4);
        }
    }
}

static void interleave_halves(const uint8_t * from, size_t row_size, int n, uint8_t * to) {
    for (int j = 0; j < n; j += 2) {
        for (int64_t lane = 0; lane < kLanes; ++lane, to += 2) {
            std::memcpy(to, from + lane * row_size + j, 2);
        }
    }
}

// Bit i of the stored fifth bits belongs to value i; in a packed lane, bit j of byte k to value 4 j + k.
CLONES static void reorder_fifth_bits(uint32_t * lanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        uint32_t packed = 0;
        for (int k = 0; k < 4; ++k) {
            uint32_t bits = lanes[lane] >> k & 0x11111111; // every fourth, and now beside each other
            bits          = (bits | bits >> 3) & 0x03030303;
            bits          = (bits | bits >> 6) & 0x000f000f;
            bits          = (bits | bits >> 12) & 0xff;
            packed |= bits << 8 * k;
        }
        lanes[lane] = packed;
    }
}

static void pack_blocks(const PackedKernels & kernels, ggml_type type, const uint8_t * rows, size_t row_size,
                        int64_t n_in, uint8_t * group) {
    const Parts   parts    = parts_of(type);
    const int64_t n_blocks = n_in / 32;
    uint8_t *     scales   = group;
    uint8_t *     levels   = group;
    for (int64_t b = 0; b < n_blocks; ++b, rows += parts.levels + parts.n_levels) {
        if (b % 2 == 0) { // a pair has the scales of both, then the levels of both
            scales = levels;
            levels += std::min<int64_t>(2, n_blocks - b) * parts.n_scales * kLanes;
        }
        interleave_halves(rows, row_size, parts.n_scales, scales);
        scales += parts.n_scales * kLanes;
        if (parts.upper > 0) {
            uint32_t bits[kLanes];
            interleave(rows + parts.upper, row_size, 4, reinterpret_cast<uint8_t *>(bits));
            reorder_fifth_bits(bits);
            std::memcpy(levels, bits, sizeof(bits));
            levels += sizeof(bits);
        }
        interleave(rows + parts.levels, row_size, parts.n_levels, levels);
        if (type == GGML_TYPE_Q8_0) {
            for (int64_t i = 0; i < parts.n_levels * kLanes; ++i) {
                levels[i] = static_cast<uint8_t>(levels[i] + kernels.byte_offset);
            }
        }
        levels += parts.n_levels * kLanes;
    }
}

// The lower four bits of two blocks of 32, of which ggml has one in the low and one in the high halves: each block in
// 16 bytes of its own.
static void part_levels(const uint8_t * from, uint8_t * first, uint8_t * second) {
    for (int i = 0; i < 16; ++i) {
        first[i]  = static_cast<uint8_t>((from[i] & 15) | from[i + 16] << 4);
        second[i] = static_cast<uint8_t>(from[i] >> 4 | (from[i + 16] & 0xf0));
    }
}

// A super-block as ggml stores it, in the order of the kernels: scales, upper bits of each block of 32, and levels.
CLONES static void order_super_block(ggml_type type, const uint8_t * from, uint8_t * to) {
    const Parts     parts  = parts_of(type);
    const uint8_t * upper  = from + parts.upper;
    const uint8_t * levels = from + parts.levels;
    if (type == GGML_TYPE_IQ4_XS) {
        std::memcpy(to, from, 8 + 128);
        return;
    }
    if (type == GGML_TYPE_Q6_K) {
        std::memcpy(to, from + 208, 2);
        std::memcpy(to + 2, from + 192, 16);
        to += 18;
        uint32_t words[16]; // bits 2 q and 2 q + 1 of each byte belong to block q of this half of the super-block
        std::memcpy(words, upper, sizeof(words));
        for (int b = 0; b < 8; ++b, to += 8) {
            uint32_t ordered[2] = { 0, 0 }; // bits 2 j and 2 j + 1 of byte i belong to value 4 j + i of 16
            for (int j = 0; j < 8; ++j) {
                ordered[j / 4] |= (words[b / 4 * 8 + j] >> 2 * (b % 4) & 0x03030303) << 2 * (j % 4);
            }
            std::memcpy(to, ordered, sizeof(ordered));
        }
        for (int n = 0; n < 2; ++n, to += 64, levels += 64) {
            part_levels(levels, to, to + 32);
            part_levels(levels + 32, to + 16, to + 48);
        }
        return;
    }
    std::memcpy(to, from, 16);
    to += 16;
    if (type == GGML_TYPE_Q5_K) {
        uint32_t words[8]; // bit b of each byte belongs to block b
        std::memcpy(words, upper, sizeof(words));
        for (int b = 0; b < 8; ++b, to += 4) {
            uint32_t ordered = 0; // bit j of byte i belongs to value 4 j + i
            for (int j = 0; j < 8; ++j) {
                ordered |= (words[j] >> b & 0x01010101) << j;
            }
            std::memcpy(to, &ordered, sizeof(ordered));
        }
    }
    for (int pair = 0; pair < 4; ++pair, to += 32, levels += 32) {
        part_levels(levels, to, to + 16);
    }
}

static void pack_super_blocks(ggml_type type, const uint8_t * rows, size_t row_size, int64_t n_in, uint8_t * group) {
    constexpr size_t kMost  = 210;
    const int        size   = static_cast<int>(ggml_type_size(type));
    const int        d      = type == GGML_TYPE_Q6_K ? 2 : 0; // bytes of scales before all super-blocks
    const int        halves = type == GGML_TYPE_Q6_K ? 0 : 4;
    uint8_t *        scales = group;
    group += n_in / 256 * d * kLanes;
    for (int64_t b = 0; b < n_in / 256; ++b, rows += size) {
        uint8_t ordered[kLanes * kMost];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            order_super_block(type, rows + lane * row_size, ordered + lane * kMost);
        }
        interleave_halves(ordered, kMost, d, scales);
        interleave_halves(ordered + d, kMost, halves, group);
        interleave(ordered + d + halves, kMost, size - d - halves, group + halves * kLanes);
        scales += d * kLanes;
        group += (size - d) * kLanes;
    }
}

static void pack_low(ggml_type type, const uint8_t * rows, size_t row_size, int64_t n_in, uint8_t * group) {
    const LowParts parts(type, n_in);
    interleave_halves(rows, row_size, static_cast<int>(parts.levels), group);
    interleave(rows + parts.levels, row_size, static_cast<int>(parts.size - parts.levels),
               group + parts.levels * kLanes);
}

void pack_rows(const PackedKernels & kernels, ggml_type type, const uint8_t * rows, int64_t n_rows, int64_t n_in,
               uint8_t * packed) {
    const size_t size = row_size(type, n_in);
    for (int64_t row = 0; row < n_rows; row += kLanes, rows += kLanes * size, packed += kLanes * size) {
        if (is_low(type)) {
            pack_low(type, rows, size, n_in, packed);
        } else if (has_super_blocks(type)) {
            pack_super_blocks(type, rows, size, n_in, packed);
        } else {
            pack_blocks(kernels, type, rows, size, n_in, packed);
        }
    }
}

} // namespace coreinfer
