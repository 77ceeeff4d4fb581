#pragma once

// Rows of weights in the formats of 4, 3 and 2 bits: for weights that matter less.

#include "coreinfer.h"
#include "kernels/packed_product.h"

#include <cstdint>

namespace coreinfer {

// The format of a level that is not full.
inline ggml_type low_type(coreinfer_level level) {
    return level == COREINFER_LEVEL_4_BITS ? kLow4 : level == COREINFER_LEVEL_3_BITS ? kLow3 : kLow2;
}

// Quantises n weights, a multiple of 32, to a row of kLow4, kLow3 or kLow2: each half of a block of 32 with the scale
// and the minimum of least squared error.
void quantize_low_row(ggml_type type, const float * weights, int64_t n, uint8_t * row);

// The n weights of a row.
void dequantize_low_row(ggml_type type, const uint8_t * row, int64_t n, float * weights);

} // namespace coreinfer
