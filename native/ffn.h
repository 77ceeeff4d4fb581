#pragma once

// The dense FFNs of a model, and where their weights lie in its files.

#include "ggml-backend.h"
#include "ggml.h"
#include "tensor_file.h"

#include <cstdint>
#include <initializer_list>

namespace coreinfer {

inline uint64_t bytes_of(std::initializer_list<const ggml_tensor *> tensors) {
    uint64_t sum = 0;
    for (const ggml_tensor * tensor : tensors) {
        sum += tensor ? ggml_nbytes(tensor) : 0;
    }
    return sum;
}

// A dense FFN of the model, which owns the tensors.
struct Ffn {
    int  layer;
    bool fused; // up has the rows of the gate first, then its own

    const ggml_tensor * up;
    const ggml_tensor * up_b;
    const ggml_tensor * gate;
    const ggml_tensor * gate_b;
    const ggml_tensor * down;
    const ggml_tensor * down_b;

    ggml_backend_dev_t device = nullptr; // where llama.cpp computes the layer; nullptr: on the CPU

    FileTensor up_file;
    FileTensor gate_file;
    FileTensor down_file;

    int64_t n_in() const { return up->ne[0]; }

    int64_t n_ff() const { return down->ne[0]; }

    int64_t n_out() const { return down->ne[1]; }

    // Whether the device that computes the layer would have to fetch the weights for each token.
    bool is_far() const { return device && ggml_backend_buffer_is_host(down->buffer); }

    uint64_t n_bytes() const { return bytes_of({ up, up_b, gate, gate_b, down, down_b }); }
};

} // namespace coreinfer
