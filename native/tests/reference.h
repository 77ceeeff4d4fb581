#pragma once

// The formats of gathered columns in plain scalar code, written from their definition: what
// quant.cpp is held against.

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace test {

// One block of 32 values: value i is scale * level[i] + minimum.
struct Block {
    uint16_t scale;     // as stored, in half precision
    uint16_t minimum;   // as stored; 0 where the format has none
    int      level[32]; // -8 .. 7 (Q4_0), -16 .. 15 (Q5_0), -127 .. 127 (Q8_0), 0 .. 15 (Q4_1), 0 .. 31 (Q5_1)
    float    exact[32]; // the levels before they were rounded, where that is known
};

// Whether the type is one of those.
bool has_blocks_of_32(ggml_type type);

// A block of values to levels, rounded to the nearest.
Block reference_block(ggml_type type, const float * values);

// A block to and from its bytes.
void  store_block(ggml_type type, const Block & block, uint8_t * bytes);
Block load_block(ggml_type type, const uint8_t * bytes);

// n values, a multiple of 32, to the bytes of a row of any type that columns are stored in.
std::vector<uint8_t> reference_row(ggml_type type, const std::vector<float> & values);

// Whether the row holds the values: scales as in reference_row, each value at its nearest level. Of two that
// are equally near either will do, and the sign of a zero and the levels of an all-zero block do not count.
bool holds_values(ggml_type type, const uint8_t * row, const std::vector<float> & values);

// One row of any type to values, by ggml.
std::vector<float> row_values(ggml_type type, const void * bytes, int64_t n);

} // namespace test
