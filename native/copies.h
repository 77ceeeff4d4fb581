#pragma once

// Packed copies of the dense weights of a model.

#include "coreinfer.h"
#include "ggml-cpp.h"
#include "tensor_file.h"

#include <vector>

namespace coreinfer {

// Weights of the model beside its FFNs, in packed order (packed_weights.h).
struct PackedCopy {
    ggml_tensor *           tensor = nullptr;
    ggml_context_ptr        context;
    ggml_backend_buffer_ptr buffer;
};

// Whether products with these weights are computed on the CPU, and there are kernels for a copy.
bool can_copy_packed(const ggml_tensor * weights);

// Make copies of these weights from the files, which have them. Throws Error.
std::vector<PackedCopy> copy_packed(const std::vector<const ggml_tensor *> & weights, const TensorFiles & files,
                                    int n_threads);

// Copy what the graph multiplies into the order of our kernels, as far as there are kernels for it.
void make_copies(coreinfer_context & ctx);

} // namespace coreinfer
