#pragma once

// Products of packed weights with quantised activations. There is a version for each set of vector instructions.
//
// Weights are packed in groups of 16 rows. Lane i of a vector belongs to row i, so a sum over a row never crosses
// lanes. Each 32-bit lane holds four consecutive weights of its row; one instruction multiplies them with four 8-bit
// activations. A packed tensor has the size that ggml gives it.
//
// To add a set of instructions, write a file like avx2.cpp: a Vector type for packed_product_driver.h, and a function
// that returns its PackedKernels. Declare that function below, name it in packed_kernels(), and compile the file with
// its flags in CMakeLists.txt.

#include "ggml.h"
#include "kernels/attention.h"

#include <cstdint>

namespace coreinfer {

constexpr int64_t kLanes = 16;

// Formats of our own with 4, 3 and 2 bits, beside the types of ggml.
constexpr ggml_type kLow4 = static_cast<ggml_type>(61);
constexpr ggml_type kLow3 = static_cast<ggml_type>(62);
constexpr ggml_type kLow2 = static_cast<ggml_type>(63);
static_assert(GGML_TYPE_COUNT <= kLow4, "ggml has a type of this number");

// The weights that share the steps of scales and minima in these formats.
constexpr int64_t kSuper = 1024;

// Activations of some tokens, quantised in blocks of 32: ggml's Q8_0, but with scales in single precision. Tokens are
// in tiles. Of each block those of all tokens of a tile stand beside each other, and one tile follows the other.
template <class Value, class Float, class Int>
struct Quantized {
    Value * values; // 32 of each block
    Float * scales;
    Int *   starts; // minus the sum of a block's values, times level_offset()
    Float * sums;   // the sum of a block's values, times its scale
    Int *   halves; // the sum of the values of each half of a block

    // From a number of blocks on.
    Quantized from(int64_t n) const { return { values + 32 * n, scales + n, starts + n, sums + n, halves + 2 * n }; }
};

using QuantizedBlocks = Quantized<int8_t, float, int32_t>;

struct QuantizedInput : Quantized<const int8_t, const float, const int32_t> {
    int64_t n_in;  // the activations of a token to multiply with
    int64_t n_all; // of those that there are
    int64_t first; // and where they begin, a multiple of 32

    // The blocks of a tile at token, from block b of those to multiply with on.
    QuantizedInput tile(int64_t token, int64_t width, int64_t b) const {
        return { from(token * (n_all / 32) + (first / 32 + b) * width), n_in, n_all, first };
    }
};

// Tokens first to first + width - 1.
struct Tile {
    int64_t first;
    int64_t width;
};

// The tile of a token: as many of the most tokens as there are, then of half as many, and so on. most is a power of
// two.
inline Tile tile_of(int64_t token, int64_t n_tokens, int64_t most) {
    Tile tile = { 0, most };
    while (true) {
        const int64_t end = tile.first + (n_tokens - tile.first) / tile.width * tile.width;
        if (token < end) {
            return { token - (token - tile.first) % tile.width, tile.width };
        }
        tile = { end, tile.width / 2 };
    }
}

// Whether the tokens of a tile of this width are in pairs, with kernels that have pairs.
constexpr bool in_pairs(bool pairs, int64_t width) {
    return pairs && width > 2; // for two tokens alone they do not pay
}

// Where value i of a block is. In pairs eight values of one token stand before eight of the next.
constexpr int64_t value_at(int64_t block, int64_t i, bool is_in_pairs) {
    return is_in_pairs ? 32 * (block - block % 2) + 8 * (block % 2) + i + i / 8 * 8 : 32 * block + i;
}

struct PackedKernels {
    const char * name; // what COREINFER_KERNELS calls them

    // What is added to the levels of Q8_0 when they are packed, and to those that IQ4_NL and IQ4_XS name: 128 for a dot
    // product that takes unsigned levels, 0 for one that takes signed levels.
    int32_t byte_offset;

    // The most tokens of a tile, a power of two.
    int64_t tile;

    // Whether they want two tokens beside each other: see value_at().
    bool pairs;

    // Quantises the n_in activations of one token of a tile, which has width tokens and begins at to. If an activation
    // is NaN or infinite, every product with it is NaN.
    void (*quantize)(const float * x, int64_t n_in, int32_t offset, int64_t token, int64_t width,
                     const QuantizedBlocks & to);

    // out[token * stride + i] = the product with row i of the groups, which have n_groups * kLanes rows. in has
    // n_tokens tokens, all of them. add: this is added to what is there.
    void (*multiply)(ggml_type type, const uint8_t * groups, int64_t n_groups, const QuantizedInput & in,
                     int64_t n_tokens, float * out, int64_t stride, bool add);

    attention::Attend attend;
};

// Compiled for one processor each. The caller must have asked whether this one has the instructions.
const PackedKernels * packed_kernels_avx512vnni();
const PackedKernels * packed_kernels_avx512();
const PackedKernels * packed_kernels_avxvnni();
const PackedKernels * packed_kernels_avx2();
const PackedKernels * packed_kernels_i8mm();
const PackedKernels * packed_kernels_dotprod();
const PackedKernels * packed_kernels_neon();

namespace { // every file has its own, compiled for the instructions of that file

// The parts of a block of weights as ggml stores it: 32, or a super-block of 256. A packed group has each part kLanes
// times, those of blocks of 32 in pairs: scales first.
struct Parts {
    int n_scales; // bytes
    int upper;    // where the bits above the lower four begin, 0 if there are none
    int levels;   // where the levels begin
    int n_levels; // bytes
};

constexpr Parts parts_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL:
            return { 2, 0, 2, 16 };
        case GGML_TYPE_Q4_1:
            return { 4, 0, 4, 16 };
        case GGML_TYPE_Q5_0:
            return { 2, 2, 6, 16 };
        case GGML_TYPE_Q5_1:
            return { 4, 4, 8, 16 };
        case GGML_TYPE_Q8_0:
            return { 2, 0, 2, 32 };
        case GGML_TYPE_IQ4_XS:
            return { 8, 0, 8, 128 };
        case GGML_TYPE_Q4_K:
            return { 16, 0, 16, 128 };
        case GGML_TYPE_Q5_K:
            return { 16, 16, 48, 128 };
        default: // Q6_K, whose scales come last
            return { 18, 128, 0, 128 };
    }
}

constexpr bool is_low(ggml_type type) {
    return type == kLow4 || type == kLow3 || type == kLow2;
}

// The parts of a row of n weights in these formats: for each super-block the steps of scales and of minima in half
// precision; for each block of 32 the numbers of steps, of the scales and of the minima of its halves, four bits each;
// for each block its levels. Bits 2 j and 2 j + 1 of byte k of word i are those of level 16 i + 4 j + k. Of 3 bits the
// upper come first: bit j of byte k is that of level 4 j + k. Of 4 bits, byte i has level i in its lower and level
// i + 16 in its upper half. A weight is scale * level - minimum.
struct LowParts {
    int64_t n_supers;
    int64_t scales; // where they begin, in bytes
    int64_t levels;
    int64_t n_levels; // bytes of a block
    int64_t size;

    constexpr LowParts(ggml_type type, int64_t n) :
        n_supers((n + kSuper - 1) / kSuper),
        scales(4 * n_supers),
        levels(scales + (n / 32 + 1) / 2 * 4), // whole vectors, once interleaved
        n_levels(type == kLow4   ? 16
                 : type == kLow3 ? 12
                                 : 8),
        size(levels + n / 32 * n_levels) {}
};

// Bytes of a row of n weights.
inline int64_t row_size(ggml_type type, int64_t n) {
    return is_low(type) ? LowParts(type, n).size : static_cast<int64_t>(ggml_row_size(type, n));
}

constexpr bool has_super_blocks(ggml_type type) {
    return type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K || type == GGML_TYPE_Q6_K || type == GGML_TYPE_IQ4_XS;
}

} // namespace

} // namespace coreinfer
