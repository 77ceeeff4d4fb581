#pragma once

// The core sets of a context: which neurons each FFN keeps, and their compact tensors.

#include "coreinfer.h"
#include "ffn.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace coreinfer {

// The compact tensors of one FFN, and what they were made of. Empty: the FFN stays dense.
struct Core {
    std::vector<int32_t> neurons;
    std::vector<float>   fill;          // empty: zero
    bool                 whole = false; // all neurons, and the weights as they are

    ggml_tensor * up     = nullptr;
    ggml_tensor * up_b   = nullptr;
    ggml_tensor * gate   = nullptr;
    ggml_tensor * gate_b = nullptr;
    ggml_tensor * down   = nullptr;
    ggml_tensor * down_b = nullptr; // the model's bias and what the fill adds

    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    uint64_t n_bytes() const;

    // Whether the tensors of another core have the shapes that this one needs.
    bool fits(const Core & other) const;
};

// Replace the core sets of a context. Throws Error; its cores are then not to be used.
void set_cores(coreinfer_context & ctx, const coreinfer_core * wanted, int32_t n_wanted);

} // namespace coreinfer
