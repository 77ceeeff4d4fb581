#pragma once

// The compact tensors of a core set: gathering them from the model file into the fastest buffers.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "tensor_file.h"

#include <cstdint>
#include <vector>

namespace coreinfer {

// A dense FFN as the model has it.
struct Ffn {
    int  layer;
    bool fused; // up holds the rows of gate, then those of up

    const ggml_tensor * up;
    const ggml_tensor * up_b;
    const ggml_tensor * gate;
    const ggml_tensor * gate_b;
    const ggml_tensor * down;
    const ggml_tensor * down_b;

    FileTensor up_file;
    FileTensor gate_file;
    FileTensor down_file;

    int64_t n_in() const { return up->ne[0]; }

    int64_t n_ff() const { return down->ne[0]; }

    int64_t n_out() const { return down->ne[1]; }

    uint64_t n_bytes() const;
};

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

// Whether the CPU computes with what is in such buffers: a device's own host buffers are among them.
bool is_on_cpu(ggml_backend_buffer_type_t type);

// The fastest buffers for weights of this shape that take the place of the model's.
ggml_backend_buffer_type_t buffer_type_for(const ggml_tensor * dense, ggml_type type, int64_t n_in, int64_t n_out);

// Layouts of buffer types interleave rows in groups of 4, 8 or 16: so many can be laid out apart from others.
constexpr int64_t kRowGroup = 32;

// Rows of a tensor as one of their own: n from first on, both multiples of kRowGroup (or up to the last).
ggml_tensor rows_of(const ggml_tensor * tensor, int64_t first, int64_t n);

// Whether a buffer type lays out a group of rows the same whether others come with it or not.
bool takes_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in);

// Gather neurons and fill into cores[i] for each listed i, making its tensors if it has none.
// Throws Error; cores is then not to be used.
void gather_cores(const std::vector<Ffn> & ffns, std::vector<Core> & cores, const std::vector<size_t> & which,
                  int n_threads);

// Weights of the model beside its FFNs, in packed order (packed_weights.h).
struct PackedCopy {
    ggml_tensor *           tensor = nullptr;
    ggml_context_ptr        context;
    ggml_backend_buffer_ptr buffer;
};

// Whether packed weights are of use: not where some layers are on a device, and the activations between products that
// the CPU alone computes would go there and back.
bool may_pack(const std::vector<Ffn> & ffns);

// Whether products with these weights are computed on the CPU, and there are kernels for a copy.
bool can_copy_packed(const ggml_tensor * weights);

// Make copies of these weights from the files, which have them. Throws Error.
std::vector<PackedCopy> copy_packed(const std::vector<const ggml_tensor *> & weights, const TensorFiles & files,
                                    int n_threads);

// For each FFN in turn, the squared norms [n_ff] of the columns of its down tensor.
void down_norms(const std::vector<Ffn> & ffns, float * norms, int n_threads);

} // namespace coreinfer
