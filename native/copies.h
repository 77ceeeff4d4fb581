#pragma once

// Packed copies of the dense weights of a model.

#include "coreinfer.h"
#include "ggml-cpp.h"
#include "tensor_file.h"

#include <vector>

namespace coreinfer {

// A copy of a tensor of the model in packed order (kernels/packed_weights.h). It owns its tensor.
struct PackedCopy {
    ggml_tensor *           tensor = nullptr;
    ggml_context_ptr        context;
    ggml_backend_buffer_ptr buffer;
};

// Whether the CPU computes products with these weights, and has kernels for a copy of them.
bool can_copy_packed(const ggml_tensor * weights);

// Read these weights from the files into copies. The files must have them. Throws Error.
std::vector<PackedCopy> copy_packed(const std::vector<const ggml_tensor *> & weights, const TensorFiles & files,
                                    int n_threads);

// Copy all weights that the graph multiplies and that can be copied. Throws Error.
void make_copies(coreinfer_context & ctx);

} // namespace coreinfer
