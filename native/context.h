#pragma once

// A coreinfer_context: what the library keeps for one llama_context.

#include "collect.h"
#include "core_set.h"
#include "coreinfer.h"
#include "ffn.h"
#include "llama-ffn.h"
#include "row_lookup.h"
#include "stream.h"
#include "tensor_file.h"
#include "weights_ahead.h"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace coreinfer {

// The argument of a graph node that fetches the weights of an FFN.
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
    bool                   packs; // core sets and streamed weights are packed, where they can be

    std::vector<coreinfer::Ffn>                     ffns;
    std::unordered_map<const ggml_tensor *, size_t> by_down;
    std::vector<coreinfer::Collected>               collected;
    coreinfer::StatisticsMemory                     statistics;
    coreinfer::Extra                                extra;
    std::vector<coreinfer::Core>                    cores;
    std::unique_ptr<coreinfer::WeightStream>        stream; // nullptr: the weights are in memory
    std::vector<coreinfer::Fetch>                   fetches;
    std::unique_ptr<coreinfer::WeightsAhead> weights_ahead;       // nullptr: no device fetches weights from main memory
    ggml_tensor *                            embedding = nullptr; // if it is not in memory
    std::unique_ptr<coreinfer::RowLookup>    lookup;

    bool            discovering = false;
    bool            collecting  = false;
    coreinfer_graph graph       = COREINFER_DENSE;
    uint64_t        versions[5] = {}; // of each graph

    coreinfer_context(llama_context * of, const std::vector<std::string> & paths, int threads, bool packed) :
        llama(of), hook(), files(paths), n_threads(threads), packs(packed) {}

    ~coreinfer_context();

    // Set the hook, learn the FFNs of the model, and make room for statistics. Throws Error.
    void attach();

    void reserve_statistics();

    // llama.cpp must build its graphs anew; with a core set in use, or others.
    void changed(bool with_core) {
        for (int i : { COREINFER_DENSE, COREINFER_CORE, COREINFER_DRAFT, COREINFER_VERIFY, COREINFER_VERIFY_THERE }) {
            if (uses_core(static_cast<coreinfer_graph>(i)) == with_core) {
                versions[i] = ++last_version;
            }
        }
        use(graph);
    }

    void collect(bool on) {
        collecting = on;
        changed(false);
        changed(true);
    }

    // Evaluate with this graph. Drafts have a side of their own, so that both graphs of exact decoding are kept.
    void use(coreinfer_graph wanted) {
        graph        = wanted;
        hook.version = versions[wanted];
        hook.side    = wanted == COREINFER_DRAFT ? 1 : 0;
    }

    static bool uses_core(coreinfer_graph graph) { return graph == COREINFER_CORE || graph == COREINFER_DRAFT; }

    // Waits until llama.cpp computes no more. Throws Error if the llama_context is gone.
    void settle() const;

  private:
    uint64_t last_version = 0;
};
