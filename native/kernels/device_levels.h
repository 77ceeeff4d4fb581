#pragma once

// The levels below full in ggml's own types, which every device multiplies with.

#include "coreinfer.h"
#include "ggml.h"

#include <cstdint>

namespace coreinfer {

// Compact tensors on a device are padded to a multiple of this many neurons of a level below full.
constexpr int64_t kDeviceBlock = 256;

// The type of rows of n weights at a level below full. GGML_TYPE_COUNT: there is none for this n.
ggml_type device_type(coreinfer_level level, int64_t n);

// Quantises n weights to a row of a type that device_type() gives for this n. ggml's own functions take four to thirty
// times as long, and do hardly better.
void quantize_device_row(ggml_type type, const float * weights, int64_t n, uint8_t * row);

} // namespace coreinfer
