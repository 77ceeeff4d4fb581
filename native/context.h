#pragma once

// A coreinfer_context: what the library keeps for one llama_context.

#include "collect.h"
#include "copies.h"
#include "core_set.h"
#include "coreinfer.h"
#include "ffn.h"
#include "llama-ffn.h"
#include "row_lookup.h"
#include "stream.h"
#include "tensor_file.h"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace coreinfer {

// An FFN whose weights a node of the graph has to fetch.
struct Fetch {
    WeightStream * stream;
    size_t         ffn;
};

} // namespace coreinfer

struct coreinfer_context {
    llama_context *        llama; // nullptr once it has been freed
    llama_ffn_hook         hook;
    coreinfer::TensorFiles files;
    int                    n_threads;

    std::vector<coreinfer::Ffn>                     ffns;
    std::unordered_map<const ggml_tensor *, size_t> by_down;
    std::vector<coreinfer::Collected>               collected;
    coreinfer::Extra                                extra;
    std::vector<coreinfer::Core>                    cores;
    std::unique_ptr<coreinfer::WeightStream>        stream; // nullptr: the weights are in memory
    std::vector<coreinfer::Fetch>                   fetches;
    std::vector<const ggml_tensor *>                multiplied; // the model's weights that can be copied packed
    std::unordered_map<const ggml_tensor *, coreinfer::PackedCopy> copies;
    ggml_tensor *                                                  embedding = nullptr; // if it is not in memory
    std::unique_ptr<coreinfer::RowLookup>                          lookup;

    bool discovering  = false;
    bool collecting   = false;
    bool using_core   = false;
    bool using_copies = false;

    coreinfer_context(llama_context * of, const std::vector<std::string> & paths, int threads) :
        llama(of), hook(), files(paths), n_threads(threads) {}

    ~coreinfer_context();

    // Set the hook, which shows every FFN of the model, and make room for what is collected. Throws Error.
    void attach();

    // Graphs built so far do not fit any more.
    void changed() { ++hook.version; }

    // Nothing is being computed with our tensors after this. Throws if there is nothing to compute with.
    void settle() const;
};
