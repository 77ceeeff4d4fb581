#pragma once

// Collects statistics of the activation of an FFN, with nodes of the graph on the CPU or a device.

#include "ffn.h"
#include "ggml-cpp.h"

#include <vector>

namespace coreinfer {

// The statistics to collect beyond the sum and the sum of squares.
struct Extra {
    bool  normalized = false;
    bool  top        = false;
    float top_share  = 0.0f;
    bool  active     = false;
};

// The statistics of one FFN. The tensors are where the activation is; top is always in host memory, since only the CPU
// computes it. This struct owns the tensors.
struct Collected {
    ggml_tensor * sum           = nullptr; // [n_ff]
    ggml_tensor * sum_sq        = nullptr; // [n_ff]
    ggml_tensor * normalized_sq = nullptr; // [n_ff]
    ggml_tensor * active        = nullptr; // [n_ff]
    ggml_tensor * count         = nullptr; // [1]
    ggml_tensor * top           = nullptr; // [n_ff]

    const Extra * extra  = nullptr;
    bool          on_cpu = true;

    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;
};

// Make the tensors of an FFN's statistics, filled with zeros. collected refers to extra from then on. Throws Error.
void make_collected(const Extra & extra, const Ffn & ffn, Collected & collected);

// Add nodes to a graph that add an activation [n_ff, n_tokens] to the statistics. The caller keeps collected for as
// long as the graph.
void add_collecting_nodes(ggml_context * ctx0, ggml_cgraph * gf, Collected & collected, ggml_tensor * act);

} // namespace coreinfer
