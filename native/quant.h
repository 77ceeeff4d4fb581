#pragma once

// Converts rows of weights to float and back. This is for the columns of ffn_down: single columns cut across the blocks
// of a quantised row, so a row is dequantised, gathered and quantised again.

#include "ggml.h"

#include <cstdint>

namespace coreinfer {

// The block size of every column type. Compact tensors are padded to a multiple of this many neurons.
constexpr int64_t kBlock = 32;

// The type that gathered columns of a tensor of this type are stored in. It has blocks of 32 or no blocks, and at least
// as many bits.
ggml_type column_type(ggml_type type);

// src: one row of n weights of this type. dst: [n]. n is a multiple of the type's block size.
void dequantize_row(ggml_type type, const void * src, float * dst, int64_t n);

// src: [n], with n a multiple of 32. dst: a row of this type, which column_type() has returned.
void quantize_row(ggml_type type, const float * src, void * dst, int64_t n);

// dst[i] = src[index[i]] for i < n.
void gather(const float * src, const int32_t * index, float * dst, int64_t n);

// The sum of a[i] * b[i].
float dot(const float * a, const float * b, int64_t n);

// acc[i] += x[i]^2.
void add_squares(const float * x, float * acc, int64_t n);

} // namespace coreinfer
