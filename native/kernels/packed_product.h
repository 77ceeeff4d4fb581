#pragma once

// Products of packed weights with quantised activations, in a version for each set of vector instructions.
//
// Weights are packed in groups of 16 rows, so that lane i of a vector belongs to row i, and a sum over a row never
// crosses lanes: each 32-bit lane holds four consecutive weights of its row, which one instruction multiplies with
// four 8-bit activations. A packed tensor has the size that ggml gives it.

#include "ggml.h"

#include <cstdint>

namespace coreinfer {

constexpr int64_t kLanes = 16;

// Activations of some tokens, quantised in blocks of 32 (ggml's Q8_0, with the scale in single precision).
struct QuantizedInput {
    const int8_t *  values; // [n_tokens, n_in]
    const float *   scales; // [n_tokens, n_in / 32]
    const int32_t * starts; // minus the sum of a block's values, times what a stored weight counts from
    const float *   sums;   // the sum of a block's values, times its scale
    int64_t         n_in;
};

struct PackedKernels {
    const char * name; // avx512 or avx2

    // n_in activations of a token, one of them NaN or infinite being NaN in every product, into the places that the
    // members of a QuantizedInput point to.
    void (*quantize)(const float * x, int64_t n_in, int32_t offset, int8_t * values, float * scales, int32_t * starts,
                     float * sums);

    // out[token * stride + i] = the product with row i of the groups, n_groups * kLanes of them.
    void (*multiply)(ggml_type type, const uint8_t * groups, int64_t n_groups, const QuantizedInput & in,
                     int64_t n_tokens, float * out, int64_t stride);

    // Whether multiply takes Q8_0 too.
    bool takes_bytes;
};

// What a weight of this type is stored from: its stored level less this is what the scale multiplies.
constexpr int32_t level_offset(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return 8;
        case GGML_TYPE_Q5_0:
            return 16;
        case GGML_TYPE_Q8_0:
            return 128;
        default:
            return 0;
    }
}

// The parts of a block of 32 weights as ggml stores it. In a group each stands for kLanes rows, all scales first.
struct Parts {
    int n_scales; // bytes
    int fifth;    // where the fifth bits begin, or 0
    int levels;   // where the levels begin
    int n_levels; // bytes
};

constexpr Parts parts_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return { 2, 0, 2, 16 };
        case GGML_TYPE_Q4_1:
            return { 4, 0, 4, 16 };
        case GGML_TYPE_Q5_0:
            return { 2, 2, 6, 16 };
        case GGML_TYPE_Q5_1:
            return { 4, 4, 8, 16 };
        default: // Q8_0
            return { 2, 0, 2, 32 };
    }
}

// Compiled for x86-64; whether the processor has the instructions is for the caller to ask.
const PackedKernels * packed_kernels_avx512();
const PackedKernels * packed_kernels_avx2();

} // namespace coreinfer
