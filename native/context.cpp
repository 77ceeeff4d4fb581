#include "context.h"

#include "devices.h"
#include "error.h"
#include "hook.h"
#include "llama.h"
#include "unread_buffer.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>

using namespace coreinfer;

namespace {

bool reading_failed(void * data) {
    const auto & ctx = *static_cast<const coreinfer_context *>(data);
    return ctx.stream->failed() || (ctx.lookup && ctx.lookup->failed());
}

// Stream the weights that are not in memory, if there are any.
void start_streaming(coreinfer_context & ctx) {
    std::map<ggml_backend_buffer_t, size_t> found;
    size_t                                  n_streamed = 0;
    for (const Ffn & ffn : ctx.ffns) {
        bool streamed = false;
        for (const ggml_tensor * tensor : { ffn.up, ffn.gate, ffn.down }) {
            if (is_unread(tensor)) {
                ++found[tensor->buffer];
                streamed = true;
            }
        }
        const bool all = is_unread(ffn.up) && is_unread(ffn.down) && (!ffn.gate || is_unread(ffn.gate));
        if (streamed && !all) {
            throw Error(COREINFER_INVALID,
                        "layer " + std::to_string(ffn.layer) + ": a part of the weights of its FFN is not in memory");
        }
        n_streamed += streamed ? 1 : 0;
    }
    if (ctx.embedding) {
        ++found[ctx.embedding->buffer];
    }
    if (found.empty()) {
        return;
    }
    if (n_streamed == 0) {
        throw Error(COREINFER_INVALID, "the embedding is not in memory, and the weights of the FFNs are");
    }
    // of a model without data, which is there to be planned with, a buffer has no memory
    const bool planned = ggml_backend_buffer_get_size(found.begin()->first) == 0;
    // llama.cpp would read at the addresses of any other
    for (const auto & [buffer, n] : found) {
        if (!planned && n != n_tensors(buffer)) {
            throw Error(COREINFER_UNSUPPORTED,
                        "weights that are neither those of a dense FFN nor the embedding are not in memory");
        }
    }
    if (n_streamed != ctx.ffns.size()) {
        throw Error(COREINFER_INVALID, "the weights of some FFNs are in memory, and those of others are not");
    }
    ctx.stream = std::make_unique<WeightStream>(ctx.ffns, ctx.files, ctx.packs);
    for (size_t i = 0; i < ctx.ffns.size(); ++i) {
        ctx.fetches.push_back({ ctx.stream.get(), i });
    }
    if (ctx.embedding && !planned) {
        const FileTensor * file = ctx.files.find(ctx.embedding);
        if (!file) {
            throw Error(COREINFER_UNSUPPORTED, "the embedding is not in memory, and not in the file");
        }
        ctx.lookup = std::make_unique<RowLookup>(ctx.embedding, *file);
    }
    llama_set_abort_callback(ctx.llama, reading_failed, &ctx);
}

// The weights that devices compute with in batches, and that lie in main memory for good.
std::unique_ptr<WeightsAhead> make_ahead(const coreinfer_context & ctx) {
    std::unordered_set<const ggml_tensor *> weights;
    for (const Ffn & ffn : ctx.ffns) {
        if (!ctx.stream && ffn.is_far() && copies_ahead(ffn.device)) {
            weights.insert({ ffn.up, ffn.gate, ffn.down });
        }
    }
    weights.erase(nullptr);
    return weights.empty() ? nullptr : std::make_unique<WeightsAhead>(std::move(weights), WeightsAhead::kAhead);
}

} // namespace

coreinfer_context::~coreinfer_context() {
    if (llama) {
        llama_set_ffn_hook(llama, nullptr);
        if (stream) {
            llama_set_abort_callback(llama, nullptr, nullptr);
        }
    }
}

void coreinfer_context::attach() {
    hook        = hook_of(*this);
    discovering = true;
    if (!llama_set_ffn_hook(llama, &hook)) {
        throw Error(COREINFER_NO_MEMORY, "no memory for the compute buffers");
    }
    discovering = false;
    changed(true);
    changed(false);
    if (ffns.empty()) {
        throw Error(COREINFER_UNSUPPORTED, "the model has no dense FFN that a core set can stand for");
    }
    cores.resize(ffns.size());
    statistics = make_collected(extra, ffns, collected);
    start_streaming(*this);
    weights_ahead = make_ahead(*this);
    reserve_statistics();
}

// On a device the buffers must have room for the nodes of statistics before it is full.
void coreinfer_context::reserve_statistics() {
    if (std::none_of(ffns.begin(), ffns.end(), [](const Ffn & ffn) { return ffn.device != nullptr; })) {
        return;
    }
    extra = { true, true, 1.0f, true };
    collect(true);
    const bool reserved = llama_set_ffn_hook(llama, &hook);
    extra               = {};
    collect(false);
    if (!reserved) {
        throw Error(COREINFER_NO_MEMORY, "no memory for the statistics on the device");
    }
}

void coreinfer_context::settle() const {
    if (!llama) {
        throw Error(COREINFER_INVALID, "the llama_context has been freed or has another coreinfer_context now");
    }
    llama_synchronize(llama);
}
