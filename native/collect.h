#pragma once

// Collects statistics of the activation of an FFN, with nodes of the graph on the CPU or a device.

#include "ffn.h"
#include "ggml-cpp.h"

#include <cstdint>
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
// computes it. StatisticsMemory owns them.
struct Collected {
    ggml_tensor * sum           = nullptr; // [n_ff]
    ggml_tensor * sum_sq        = nullptr; // [n_ff]
    ggml_tensor * normalized_sq = nullptr; // [n_ff]
    ggml_tensor * active        = nullptr; // [n_ff]
    ggml_tensor * count         = nullptr; // [1]
    ggml_tensor * top           = nullptr; // [n_ff]

    const Extra * extra  = nullptr;
    bool          on_cpu = true;
};

// Owns the tensors of all statistics: a buffer in main memory, and one on each device.
struct StatisticsMemory {
    std::vector<ggml_context_ptr>        contexts;
    std::vector<ggml_backend_buffer_ptr> buffers;

    // Fill all with zeros.
    void clear() const;
};

// Make the statistics of all FFNs, filled with zeros, which refer to extra from then on. Throws Error.
StatisticsMemory make_collected(const Extra & extra, const std::vector<Ffn> & ffns, std::vector<Collected> & all);

// Add nodes to a graph that add an activation [n_ff, n_tokens] to the statistics. The caller keeps collected for as
// long as the graph.
void add_collecting_nodes(ggml_context * ctx0, ggml_cgraph * gf, Collected & collected, ggml_tensor * act);

// How many tensors add_collecting_nodes() makes at most.
uint32_t n_collecting_tensors();

} // namespace coreinfer
