#pragma once

// A buffer type for quantised weights in the order of our own kernels (packed_product.h). These are faster than ggml's
// on x86 processors: ggml's use half of the lanes, and go row by row for Q4_1 and Q5. Only packed_multiply() can use
// packed weights.

#include "ggml-backend.h"
#include "kernels/packed_layout.h"

namespace coreinfer {

// nullptr if this processor can run none of the kernels.
ggml_backend_buffer_type_t packed_buffer_type();

// Whether there are kernels for weights of this type and shape.
bool is_packable(ggml_type type, int64_t n_in, int64_t n_out);

bool is_packed(const ggml_tensor * tensor);

// A new node [n_out, ...] for the product of packed weights [n_in, n_out] and x [n_in, ...]. x must be F32. The caller
// keeps the weights for as long as the graph.
ggml_tensor * packed_multiply(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * x);

} // namespace coreinfer
