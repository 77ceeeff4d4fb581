#pragma once

// The core sets of a context: which neurons each FFN keeps, and their compact tensors.

#include "coreinfer.h"
#include "ffn.h"
#include "ggml-cpp.h"
#include "kernels/packed_weights.h"
#include "llama-ffn.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace coreinfer {

// The neurons of a core set that are of one level.
struct Segment {
    coreinfer_level      level;
    std::vector<int32_t> neurons;
    int64_t              block; // compact tensors have a multiple of so many neurons of the level

    int64_t n_pad() const;
};

// The core set of one FFN: its neurons, and the compact tensors made of them, which it owns. Without neurons, the FFN
// stays dense.
struct Core {
    std::vector<int32_t> neurons;
    std::vector<uint8_t> levels;            // of each; empty: all in full
    std::vector<float>   fill;              // empty: zero
    bool                 whole     = false; // it has all neurons, with the weights of the model
    bool                 on_device = false;

    ggml_tensor * up     = nullptr;
    ggml_tensor * up_b   = nullptr;
    ggml_tensor * gate   = nullptr;
    ggml_tensor * gate_b = nullptr;
    ggml_tensor * down   = nullptr;
    ggml_tensor * down_b = nullptr; // the model's bias, plus the products of the neurons left out with their fill

    // If the neurons have levels: on the CPU what the tensors consist of; on a device the tensors above are of the
    // first level that there is, and each of the others is an FFN of its own, whose result is added.
    std::vector<std::unique_ptr<Mixed>>  mixed;
    std::vector<llama_ffn>               also;
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    uint64_t n_bytes() const;

    // By level; levels without neurons are left out.
    std::vector<Segment> segments() const;

    // The neurons of compact tensors.
    int64_t n_pad() const;

    // Whether this core can use the tensors of another.
    bool fits(const Core & other) const;
};

// Bytes that n weights of a row of this type take at this level of a mixed matrix, or of down if they are of columns; 0
// if it cannot have them.
float level_bytes(coreinfer_level level, ggml_type type, bool columns, int64_t n);

// The type that a device has them in at this level; GGML_TYPE_COUNT if it cannot have the level.
ggml_type device_level_type(coreinfer_level level, ggml_type type, bool columns, int64_t n);

// Bytes that a neuron of this level takes in a core set, without its biases; 0 if it cannot have the level. packs: core
// sets may be packed.
float neuron_bytes(const Ffn & ffn, coreinfer_level level, bool packs);

// The squared error that the level makes in what a neuron gives, relative to its square.
float neuron_error(const Ffn & ffn, coreinfer_level level);

// Replace the core sets of a context. Throws Error. The core sets of the context must then not be used.
void set_cores(coreinfer_context & ctx, const coreinfer_core * wanted, int32_t n_wanted);

} // namespace coreinfer
