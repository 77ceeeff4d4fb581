#include "core_set.h"

#include "context.h"
#include "error.h"
#include "gather.h"
#include "quant.h"

#include <numeric>
#include <string>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#    include <malloc.h>
#endif

namespace coreinfer {

uint64_t Core::n_bytes() const {
    return bytes_of({ up, up_b, gate, gate_b, down, down_b });
}

bool Core::fits(const Core & other) const {
    return other.up && !neurons.empty() && whole == other.whole && fill.empty() == other.fill.empty() &&
           GGML_PAD(neurons.size(), kBlock) == GGML_PAD(other.neurons.size(), kBlock);
}

namespace {

// What has been freed goes back to the system, and not to the next that asks for memory.
void trim() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// The members that tell one core set from another, checked.
Core make_core(const coreinfer_context & ctx, const coreinfer_core & wanted) {
    const std::string where = "core set of FFN " + std::to_string(wanted.ffn) + ": ";
    if (wanted.ffn < 0 || wanted.ffn >= static_cast<int32_t>(ctx.ffns.size())) {
        throw Error(COREINFER_INVALID, where + "the model has " + std::to_string(ctx.ffns.size()) + " dense FFNs");
    }
    const int64_t n_ff = ctx.ffns[wanted.ffn].n_ff();
    if (!wanted.neurons || wanted.n_neurons < 1 || wanted.n_neurons > n_ff) {
        throw Error(COREINFER_INVALID, where + "it needs 1 to " + std::to_string(n_ff) + " neurons, not " +
                                           std::to_string(wanted.n_neurons));
    }
    for (int32_t i = 0; i < wanted.n_neurons; ++i) {
        if (wanted.neurons[i] < 0 || wanted.neurons[i] >= n_ff ||
            (i > 0 && wanted.neurons[i] <= wanted.neurons[i - 1])) {
            throw Error(COREINFER_INVALID, where + "neuron " + std::to_string(wanted.neurons[i]) + " at position " +
                                               std::to_string(i) + " is not in ascending order below " +
                                               std::to_string(n_ff));
        }
    }
    Core core;
    core.neurons.assign(wanted.neurons, wanted.neurons + wanted.n_neurons);
    core.whole = wanted.n_neurons == n_ff; // then what the FFN gives is what the dense one gives, to the last bit
    if (wanted.fill && !core.whole) {
        core.fill.assign(wanted.fill, wanted.fill + n_ff);
    }
    return core;
}

} // namespace

void set_cores(coreinfer_context & ctx, const coreinfer_core * wanted, int32_t n_wanted) {
    std::vector<Core> cores(ctx.ffns.size());
    for (int32_t i = 0; i < n_wanted; ++i) {
        Core core = make_core(ctx, wanted[i]);
        if (!cores[wanted[i].ffn].neurons.empty()) {
            throw Error(COREINFER_INVALID, "FFN " + std::to_string(wanted[i].ffn) + " is named twice");
        }
        cores[wanted[i].ffn] = std::move(core);
    }
    if (ctx.stream) {
        ctx.stream->end();
        for (size_t i = 0; n_wanted > 0 && i < cores.size(); ++i) {
            if (cores[i].neurons.empty()) {
                cores[i].whole = true;
                cores[i].neurons.resize(ctx.ffns[i].n_ff());
                std::iota(cores[i].neurons.begin(), cores[i].neurons.end(), 0);
            }
        }
    }
    // keep what stays as it is, write over what has the size, free the rest before the new takes its memory
    std::vector<size_t> changed;
    for (size_t i = 0; i < cores.size(); ++i) {
        Core & now = ctx.cores[i];
        if (cores[i].neurons == now.neurons && cores[i].fill == now.fill && cores[i].whole == now.whole) {
            cores[i] = std::move(now);
            continue;
        }
        if (cores[i].fits(now)) {
            now.neurons = std::move(cores[i].neurons);
            now.fill    = std::move(cores[i].fill);
            cores[i]    = std::move(now);
        }
        if (!cores[i].neurons.empty()) {
            changed.push_back(i);
        }
    }
    ctx.cores = std::move(cores);
    if (ctx.stream) {
        trim();
    }
    if (!changed.empty()) {
        ctx.files.check_unchanged();
    }
    gather_cores(ctx.ffns, ctx.cores, changed, ctx.packs, ctx.n_threads);
}

} // namespace coreinfer
