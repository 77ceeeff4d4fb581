#pragma once

// The core sets of a context: which neurons each FFN keeps, and their compact tensors.

#include "coreinfer.h"
#include "ffn.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace coreinfer {

// The core set of one FFN: its neurons, and the compact tensors made of them, which it owns. Without neurons, the FFN
// stays dense.
struct Core {
    std::vector<int32_t> neurons;
    std::vector<float>   fill;          // empty: zero
    bool                 whole = false; // it has all neurons, with the weights of the model

    ggml_tensor * up     = nullptr;
    ggml_tensor * up_b   = nullptr;
    ggml_tensor * gate   = nullptr;
    ggml_tensor * gate_b = nullptr;
    ggml_tensor * down   = nullptr;
    ggml_tensor * down_b = nullptr; // the model's bias, plus the products of the neurons left out with their fill

    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    uint64_t n_bytes() const;

    // Whether this core can use the tensors of another.
    bool fits(const Core & other) const;
};

// Replace the core sets of a context. Throws Error. The core sets of the context must then not be used.
void set_cores(coreinfer_context & ctx, const coreinfer_core * wanted, int32_t n_wanted);

} // namespace coreinfer
