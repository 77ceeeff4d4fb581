#pragma once

// A buffer type for quantised weights in the order that our own kernels multiply them in (kernels/packed_product.h):
// faster than ggml's on x86 processors, where those compute with half of the lanes or, for Q4_1 and Q5, row by row.
// Such weights are of use in packed_multiply() alone.

#include "ggml-backend.h"
#include "kernels/packed_product.h"

#include <vector>

namespace coreinfer {

// Those that this processor has the instructions for, the fastest first.
std::vector<const PackedKernels *> packed_kernels();

// nullptr where the processor has none of the instructions that the kernels are for.
ggml_backend_buffer_type_t packed_buffer_type();

// Whether there are kernels for weights of this type and shape.
bool is_packable(ggml_type type, int64_t n_in, int64_t n_out);

bool is_packed(const ggml_tensor * tensor);

// A node for the product of packed weights [n_in, n_out] and x [n_in, ...], which must be F32: [n_out, ...]. The
// weights must be there as long as the graph is.
ggml_tensor * packed_multiply(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * x);

// n_rows rows of weights as ggml stores them, a multiple of kLanes, into their packed order.
void pack_rows(ggml_type type, const uint8_t * rows, int64_t n_rows, int64_t n_in, uint8_t * packed);

} // namespace coreinfer
