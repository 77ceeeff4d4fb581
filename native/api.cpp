#include "coreinfer.h"

#include "error.h"
#include "gather.h"
#include "ggml.h"
#include "kernels/packed_weights.h"
#include "llama-ext.h"
#include "llama-ffn.h"
#include "llama-unread.h"
#include "llama.h"
#include "quant.h"
#include "row_lookup.h"
#include "statistics.h"
#include "stream.h"
#include "unread_buffer.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#    include <malloc.h>
#endif

using namespace coreinfer;

namespace {

// What is collected beyond sum and sum of squares.
struct Extra {
    bool  normalized = false;
    bool  top        = false;
    float top_share  = 0.0f;
    bool  active     = false;
};

// The statistics of one FFN, in a buffer where the activation is, but for top, which only the CPU can tell.
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

// An FFN whose weights a node of the graph has to fetch.
struct Fetch {
    WeightStream * stream;
    size_t         ffn;
};

thread_local std::string last_error;

} // namespace

struct coreinfer_context {
    llama_context * llama; // nullptr once it has been freed
    llama_ffn_hook  hook;
    TensorFiles     files;
    int             n_threads;

    std::vector<Ffn>                                    ffns;
    std::unordered_map<const ggml_tensor *, size_t>     by_down;
    std::vector<Collected>                              collected;
    Extra                                               extra;
    std::vector<Core>                                   cores;
    std::unique_ptr<WeightStream>                       stream; // nullptr: the weights are in memory
    std::vector<Fetch>                                  fetches;
    std::vector<const ggml_tensor *>                    multiplied; // the model's weights that can be copied packed
    std::unordered_map<const ggml_tensor *, PackedCopy> copies;
    ggml_tensor *                                       embedding = nullptr; // if it is not in memory
    std::unique_ptr<RowLookup>                          lookup;

    bool discovering  = false;
    bool collecting   = false;
    bool using_core   = false;
    bool using_copies = false;

    coreinfer_context(llama_context * of, const std::vector<std::string> & paths, int threads) :
        llama(of), hook(), files(paths), n_threads(threads) {}

    ~coreinfer_context() {
        if (llama) {
            llama_set_ffn_hook(llama, nullptr);
            if (stream) {
                llama_set_abort_callback(llama, nullptr, nullptr);
            }
        }
    }

    // Graphs built so far do not fit any more.
    void changed() { ++hook.version; }

    // Nothing is being computed with our tensors after this. Throws if there is nothing to compute with.
    void settle() const {
        if (!llama) {
            throw Error(COREINFER_INVALID, "the llama_context has been freed or has another coreinfer_context now");
        }
        llama_synchronize(llama);
    }
};

namespace {

//
// hook
//

bool is_vector(const ggml_tensor * tensor, int64_t n) {
    return tensor->type == GGML_TYPE_F32 && ggml_is_vector(tensor) && tensor->ne[0] == n;
}

// Whether this is the FFN of a layer, and not the shared expert beside others, which are read all the same.
bool is_dense(const llama_ffn & ffn) {
    const std::string name   = ggml_get_name(ffn.down);
    const std::string suffix = ".ffn_down.weight";
    return name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// Take note of an FFN if a core set can stand for it: plain up (and gate), activation, down.
void discover(coreinfer_context & ctx, const llama_ffn & ffn) {
    if (!ffn.up || !ffn.down || ffn.up_s || ffn.gate_s || ffn.down_s || ffn.act_scales || (ffn.gate && !ffn.gate_par) ||
        !is_dense(ffn) || ctx.by_down.count(ffn.down)) {
        return;
    }
    const FileTensor * up   = ctx.files.find(ffn.up);
    const FileTensor * gate = ffn.gate ? ctx.files.find(ffn.gate) : nullptr;
    const FileTensor * down = ctx.files.find(ffn.down);
    if (!up || !down || (ffn.gate && !gate) || !ggml_is_matrix(ffn.up) || !ggml_is_matrix(ffn.down)) {
        return;
    }
    const int64_t n_ff  = ffn.down->ne[0];
    const int64_t n_up  = ffn.up->ne[1];
    const bool    fused = !ffn.gate && n_up == 2 * n_ff;
    if ((!fused && n_up != n_ff) || (ffn.gate && !ggml_are_same_shape(ffn.gate, ffn.up)) ||
        (ffn.up_b && !is_vector(ffn.up_b, n_up)) || (ffn.gate_b && !is_vector(ffn.gate_b, n_ff)) ||
        (ffn.down_b && !is_vector(ffn.down_b, ffn.down->ne[1]))) {
        return;
    }
    ctx.by_down[ffn.down] = ctx.ffns.size();
    ctx.ffns.push_back({ ffn.il, fused, ffn.up, ffn.up_b, ffn.gate, ffn.gate_b, ffn.down, ffn.down_b, *up,
                         gate ? *gate : FileTensor(), *down });
}

void fetch(ggml_tensor *, int ith, int nth, void * data) {
    const auto & at = *static_cast<const Fetch *>(data);
    at.stream->load(at.ffn, ith, nth);
}

// The input of the FFN passes through a node that fetches the weights: no product with them comes before it.
void stream_weights(coreinfer_context & ctx, size_t i, ggml_context * ctx0, llama_ffn & ffn) {
    const WeightStream::Tensors & tensors = ctx.stream->tensors(i);

    ffn.input = ggml_custom_inplace(ctx0, ffn.input, nullptr, 0, fetch, GGML_N_TASKS_MAX, &ctx.fetches[i]);
    ffn.up    = tensors.up;
    ffn.gate  = tensors.gate;
    ffn.down  = tensors.down;
}

void on_weights(void * data, ggml_context * ctx0, llama_ffn * ffn) {
    auto & ctx = *static_cast<coreinfer_context *>(data);
    if (ctx.discovering) {
        discover(ctx, *ffn);
        return;
    }
    const auto it = ctx.by_down.find(ffn->down);
    if (it == ctx.by_down.end()) {
        return;
    }
    if (!ctx.using_core || ctx.cores[it->second].neurons.empty()) {
        if (ctx.stream) {
            stream_weights(ctx, it->second, ctx0, *ffn);
        }
        return;
    }
    const Core & core = ctx.cores[it->second];

    ffn->up     = core.up;
    ffn->up_b   = core.up_b;
    ffn->gate   = core.gate;
    ffn->gate_b = core.gate_b;
    ffn->down   = core.down;
    ffn->down_b = core.down_b;
}

// Packed copies serve evaluations of up to this many tokens. Beyond, ggml's products of matrices are faster.
constexpr int64_t kFewTokens = 4;

// Core sets and packed copies are in an order that only our kernels know.
ggml_tensor * on_multiply(void * data, ggml_context * ctx0, ggml_tensor * weights, ggml_tensor * input) {
    auto & ctx = *static_cast<coreinfer_context *>(data);
    if (ctx.discovering) {
        const bool is_new = std::find(ctx.multiplied.begin(), ctx.multiplied.end(), weights) == ctx.multiplied.end();
        if (is_new && can_copy_packed(weights) && ctx.files.find(weights)) {
            ctx.multiplied.push_back(weights);
        }
        return nullptr;
    }
    if (is_packed(weights)) {
        return packed_multiply(ctx0, weights, input);
    }
    const auto it = ctx.copies.find(weights);
    if (!ctx.using_copies || it == ctx.copies.end() || input->type != GGML_TYPE_F32 || ggml_nrows(input) > kFewTokens) {
        return nullptr;
    }
    return packed_multiply(ctx0, it->second.tensor, input);
}

//
// nodes of the graph that add up the statistics
//

float * values(const ggml_tensor * tensor) {
    return static_cast<float *>(tensor->data);
}

// On the CPU: each thread measures a part of the tokens. dst is an array of TokenMeasure.
void measure_tokens(ggml_tensor * dst, int ith, int nth, void * data) {
    const Extra &       extra    = *static_cast<const Collected *>(data)->extra;
    const ggml_tensor * act      = dst->src[0];
    auto *              measures = static_cast<TokenMeasure *>(dst->data);

    thread_local std::vector<int32_t> scratch;
    for (int64_t token = ith; token < act->ne[1]; token += nth) {
        const float * row = values(act) + token * static_cast<int64_t>(act->nb[1] / sizeof(float));
        measures[token]   = measure_token(row, act->ne[0], extra.top ? extra.top_share : 0.0f, scratch);
    }
}

// On the CPU: each thread adds up a part of the neurons over all tokens.
void add_part(const Sums & sums, const ggml_tensor * act, const ggml_tensor * measures, int ith, int nth) {
    const int64_t n_ff  = act->ne[0];
    const int64_t part  = GGML_PAD((n_ff + nth - 1) / nth, 64);
    const int64_t first = std::min(n_ff, ith * part);
    add_tokens(values(act) + first, act->nb[1] / sizeof(float), act->ne[1],
               measures ? static_cast<const TokenMeasure *>(measures->data) : nullptr, sums.from(first),
               std::min(n_ff - first, part));
}

void add_all(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto &        collected = *static_cast<const Collected *>(data);
    const ggml_tensor * act       = dst->src[1];
    const ggml_tensor * measures  = dst->src[2];
    const Extra &       extra     = *collected.extra;
    add_part(
        { values(collected.sum), values(collected.sum_sq), extra.normalized ? values(collected.normalized_sq) : nullptr,
          extra.top ? values(collected.top) : nullptr, extra.active ? values(collected.active) : nullptr },
        act, measures, ith, nth);
    if (ith == 0) {
        *values(collected.count) += static_cast<float>(act->ne[1]);
    }
}

// The same for top alone, whose activation the scheduler has brought over from another device.
void add_top(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * act      = dst->src[1];
    const auto *        measures = static_cast<const TokenMeasure *>(dst->src[2]->data);
    const int64_t       part     = (act->ne[0] + nth - 1) / nth;
    const int64_t       first    = std::min(act->ne[0], ith * part);
    const int64_t       end      = std::min(act->ne[0], first + part);
    for (int64_t token = 0; token < act->ne[1]; ++token) {
        const float * row = values(act) + token * static_cast<int64_t>(act->nb[1] / sizeof(float));
        for (int64_t i = first; i < end; ++i) {
            values(dst)[i] += row[i] >= measures[token].top ? 1.0f : 0.0f;
        }
    }
}

// Sums on a device, with nodes that every backend has.
void add_on_device(ggml_context * ctx0, ggml_cgraph * gf, const Collected & collected, ggml_tensor * act) {
    const auto add = [&](ggml_tensor * to, ggml_tensor * terms) {
        ggml_build_forward_expand(gf, ggml_add_inplace(ctx0, to, ggml_reshape_1d(ctx0, terms, to->ne[0])));
    };
    const auto by_neuron = [&](ggml_tensor * tensor) { // [n_tokens, n_ff]
        return ggml_cont(ctx0, ggml_transpose(ctx0, tensor));
    };
    ggml_tensor * transposed = by_neuron(act);
    ggml_tensor * sum        = ggml_sum_rows(ctx0, transposed);
    add(collected.sum, sum);
    add(collected.sum_sq, ggml_sum_rows(ctx0, ggml_sqr(ctx0, transposed)));
    add(collected.count, ggml_scale_bias(ctx0, ggml_view_1d(ctx0, sum, 1, 0), 0.0f, static_cast<float>(act->ne[1])));
    if (collected.extra->normalized) {
        ggml_tensor * normalized = ggml_l2_norm(ctx0, act, 1e-30f);
        add(collected.normalized_sq, ggml_sum_rows(ctx0, ggml_sqr(ctx0, by_neuron(normalized))));
    }
    if (collected.extra->active) {
        add(collected.active, ggml_sum_rows(ctx0, ggml_step(ctx0, ggml_abs(ctx0, transposed))));
    }
}

void on_activation(void * data, ggml_context * ctx0, ggml_cgraph * gf, ggml_tensor * act, const ggml_tensor * down) {
    auto &     ctx = *static_cast<coreinfer_context *>(data);
    const auto it  = ctx.by_down.find(down);
    if (!ctx.collecting || it == ctx.by_down.end() || act->ne[0] != down->ne[0] || act->type != GGML_TYPE_F32) {
        return;
    }
    if (ctx.using_core && !ctx.cores[it->second].neurons.empty()) {
        return; // padding can make the compact activation as wide as the dense one
    }
    Collected &   collected = ctx.collected[it->second];
    const int64_t n_tokens  = ggml_nelements(act) / act->ne[0];
    act                     = ggml_reshape_2d(ctx0, act, act->ne[0], n_tokens);

    ggml_tensor * args[] = { act, nullptr };
    int           n_args = 1;
    if (ctx.extra.top || (ctx.extra.normalized && collected.on_cpu)) {
        args[1] = ggml_custom_4d(ctx0, GGML_TYPE_F32, sizeof(TokenMeasure) / sizeof(float), n_tokens, 1, 1, &act, 1,
                                 measure_tokens, GGML_N_TASKS_MAX, &collected);
        n_args  = 2;
    }
    const auto add = [&](ggml_tensor * to, ggml_custom_op_t node) {
        ggml_build_forward_expand(gf, ggml_custom_inplace(ctx0, to, args, n_args, node, GGML_N_TASKS_MAX, &collected));
    };
    if (collected.on_cpu) {
        add(collected.sum, add_all);
        return;
    }
    add_on_device(ctx0, gf, collected, act);
    if (ctx.extra.top) {
        add(collected.top, add_top);
    }
}

// The next FFN's weights come to where this one's are: its nodes go into the graph before those that follow,
// and the CPU computes in that order.
void on_product(void * data, ggml_cgraph * gf, ggml_tensor * product) {
    if (static_cast<coreinfer_context *>(data)->stream) {
        ggml_build_forward_expand(gf, product);
    }
}

// Every thread comes here, whatever number of tasks the node has.
void fetch_rows(ggml_tensor * tokens, int ith, int, void * data) {
    if (ith == 0) {
        static_cast<RowLookup *>(data)->fetch(static_cast<const int32_t *>(tokens->data), tokens->ne[0]);
    }
}

// The tokens pass through a node that fetches their rows.
ggml_tensor * on_lookup(void * data, ggml_context * ctx0, ggml_tensor * tokens, ggml_tensor * embedding) {
    auto & ctx = *static_cast<coreinfer_context *>(data);
    if (ctx.discovering && is_unread(embedding)) {
        ctx.embedding = embedding;
    }
    if (!ctx.lookup || ctx.lookup->matrix() != embedding) {
        return tokens;
    }
    return ggml_custom_inplace(ctx0, tokens, nullptr, 0, fetch_rows, 1, ctx.lookup.get());
}

void on_released(void * data) {
    auto & ctx = *static_cast<coreinfer_context *>(data);
    ctx.llama  = nullptr;
    ctx.lookup.reset(); // the model may go next
}

//
// statistics
//

void make_collected(const coreinfer_context & ctx, const Ffn & ffn, Collected & collected) {
    ggml_backend_buffer_type_t type   = ggml_backend_buffer_get_type(ffn.down->buffer);
    ggml_backend_dev_t         device = ggml_backend_buft_get_device(type);

    const auto place = [&](std::initializer_list<std::pair<ggml_tensor **, int64_t>> tensors,
                           ggml_backend_buffer_type_t                                where) {
        ggml_context_ptr meta(ggml_init({ ggml_tensor_overhead() * tensors.size(), nullptr, /*no_alloc*/ true }));
        ggml_backend_buffer_ptr buffer;
        if (meta) {
            for (const auto & [tensor, n] : tensors) {
                *tensor = ggml_new_tensor_1d(meta.get(), GGML_TYPE_F32, n);
            }
            buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(meta.get(), where));
        }
        if (!buffer) {
            throw Error(COREINFER_NO_MEMORY,
                        "no memory for the statistics of " + std::to_string(ffn.n_ff()) + " neurons");
        }
        ggml_backend_buffer_clear(buffer.get(), 0);
        collected.contexts.push_back(std::move(meta));
        collected.buffers.push_back(std::move(buffer));
    };
    collected.extra  = &ctx.extra;
    collected.on_cpu = is_on_cpu(type);
    place({ { &collected.sum, ffn.n_ff() },
            { &collected.sum_sq, ffn.n_ff() },
            { &collected.normalized_sq, ffn.n_ff() },
            { &collected.active, ffn.n_ff() },
            { &collected.count, 1 } },
          collected.on_cpu ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(device));
    place({ { &collected.top, ffn.n_ff() } }, ggml_backend_cpu_buffer_type());
}

//
// streaming
//

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
    // llama.cpp would read at the addresses of any other
    for (const auto & [buffer, n] : found) {
        if (n != n_tensors(buffer)) {
            throw Error(COREINFER_UNSUPPORTED,
                        "weights that are neither those of a dense FFN nor the embedding are not in memory");
        }
    }
    if (n_streamed != ctx.ffns.size()) {
        throw Error(COREINFER_INVALID, "the weights of some FFNs are in memory, and those of others are not");
    }
    ctx.stream = std::make_unique<WeightStream>(ctx.ffns, ctx.files);
    for (size_t i = 0; i < ctx.ffns.size(); ++i) {
        ctx.fetches.push_back({ ctx.stream.get(), i });
    }
    if (ctx.embedding) {
        const FileTensor * file = ctx.files.find(ctx.embedding);
        if (!file) {
            throw Error(COREINFER_UNSUPPORTED, "the embedding is not in memory, and not in the file");
        }
        ctx.lookup = std::make_unique<RowLookup>(ctx.embedding, *file);
    }
    ctx.files.leave_cache();
    llama_set_abort_callback(ctx.llama, reading_failed, &ctx);
}

// What has been freed goes back to the system, and not to the next that asks for memory.
void trim() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

WeightStream & stream_of(coreinfer_context & ctx) {
    ctx.settle();
    if (!ctx.stream) {
        throw Error(COREINFER_INVALID, "the weights of this model are in memory: there is nothing to stream");
    }
    return *ctx.stream;
}

//
// core set
//

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
    gather_cores(ctx.ffns, ctx.cores, changed, ctx.n_threads);
}

// Copy what the graph multiplies into the order of our kernels, as far as there are kernels for it.
void make_copies(coreinfer_context & ctx) {
    // While the FFNs stream there is no memory for copies. On a device, activations would travel back and forth.
    if (ctx.stream || !may_pack(ctx.ffns)) {
        return;
    }
    std::vector<const ggml_tensor *> missing;
    for (const ggml_tensor * weights : ctx.multiplied) {
        if (!ctx.copies.count(weights)) {
            missing.push_back(weights);
        }
    }
    if (missing.empty()) {
        return;
    }
    ctx.files.check_unchanged();
    std::vector<PackedCopy> made = copy_packed(missing, ctx.files, ctx.n_threads);
    for (size_t i = 0; i < made.size(); ++i) {
        ctx.copies.emplace(missing[i], std::move(made[i]));
    }
}

// Keep why a call failed; without the memory for it there is no reason, but a status.
coreinfer_status failed(coreinfer_status status, const char * reason) noexcept {
    try {
        last_error = reason;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

// Run body, and turn what it throws into a status: nothing may be thrown through the C interface.
template <typename Body>
coreinfer_status guarded(Body body) noexcept {
    try {
        body();
        return COREINFER_OK;
    } catch (const Error & error) {
        return failed(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return failed(COREINFER_NO_MEMORY, "out of memory");
    } catch (const std::exception & error) {
        return failed(COREINFER_INTERNAL, error.what());
    } catch (...) {
        return failed(COREINFER_INTERNAL, "unknown exception");
    }
}

// The context; NULL, which a caller is left with after coreinfer_free, is an error and no crash.
template <typename Context>
Context & alive(Context * ctx) {
    if (!ctx) {
        throw Error(COREINFER_INVALID, "this coreinfer_context is NULL: it was freed, or never made");
    }
    return *ctx;
}

const Ffn & ffn_at(const coreinfer_context * ctx, int32_t i) {
    alive(ctx).settle(); // the tensors are the model's
    if (i < 0 || i >= static_cast<int32_t>(ctx->ffns.size())) {
        throw Error(COREINFER_INVALID,
                    "FFN " + std::to_string(i) + ": the model has " + std::to_string(ctx->ffns.size()) + " dense FFNs");
    }
    return ctx->ffns[i];
}

} // namespace

int32_t coreinfer_api_version(void) {
    return COREINFER_API_VERSION;
}

const char * coreinfer_last_error(void) {
    return last_error.c_str();
}

coreinfer_status coreinfer_new(llama_context * llama, const char * const * paths, int32_t n_paths, int32_t n_threads,
                               coreinfer_context ** result) {
    return guarded([&] {
        if (!llama || !paths || n_paths < 1 || !result) {
            throw Error(COREINFER_INVALID,
                        "a llama_context, the path of a model file and a place for the result are needed");
        }
        std::unique_ptr<coreinfer_context> ctx(
            new coreinfer_context(llama, std::vector<std::string>(paths, paths + n_paths), n_threads));
        ctx->hook = { ctx.get(), 0, on_weights, on_multiply, on_activation, on_product, on_lookup, on_released };

        // setting the hook builds the graphs, which shows it every FFN
        ctx->discovering = true;
        if (!llama_set_ffn_hook(llama, &ctx->hook)) {
            throw Error(COREINFER_NO_MEMORY, "no memory for the compute buffers");
        }
        ctx->discovering = false;
        ctx->changed();
        if (ctx->ffns.empty()) {
            throw Error(COREINFER_UNSUPPORTED, "the model has no dense FFN that a core set can stand for");
        }
        ctx->cores.resize(ctx->ffns.size());
        ctx->collected.resize(ctx->ffns.size());
        for (size_t i = 0; i < ctx->ffns.size(); ++i) {
            make_collected(*ctx, ctx->ffns[i], ctx->collected[i]);
        }
        start_streaming(*ctx);
        *result = ctx.release();
    });
}

void coreinfer_free(coreinfer_context * ctx) {
    delete ctx;
}

int32_t coreinfer_n_ffn(const coreinfer_context * ctx) {
    return ctx ? static_cast<int32_t>(ctx->ffns.size()) : 0;
}

coreinfer_status coreinfer_ffn_get(const coreinfer_context * ctx, int32_t ffn, coreinfer_ffn * result) {
    return guarded([&] {
        const Ffn & at = ffn_at(ctx, ffn);

        result->layer     = at.layer;
        result->n_in      = static_cast<int32_t>(at.n_in());
        result->n_ff      = static_cast<int32_t>(at.n_ff());
        result->n_out     = static_cast<int32_t>(at.n_out());
        result->up_type   = at.up->type;
        result->down_type = at.down->type;
        result->gated     = at.fused || at.gate;
        result->n_bytes   = at.n_bytes();
    });
}

int32_t coreinfer_column_type(int32_t type) {
    if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(static_cast<ggml_type>(type)) == 0) {
        return -1;
    }
    return column_type(static_cast<ggml_type>(type));
}

coreinfer_status coreinfer_stats_collect(coreinfer_context * ctx, bool on, uint32_t extra, float top_share) {
    return guarded([&] {
        alive(ctx).settle();
        if (extra & ~uint32_t(COREINFER_STAT_NORMALIZED | COREINFER_STAT_TOP | COREINFER_STAT_ACTIVE)) {
            throw Error(COREINFER_INVALID, std::to_string(extra) + " names a statistic that is not known");
        }
        if (!(top_share >= 0.0f && top_share <= 1.0f)) {
            throw Error(COREINFER_INVALID, "top_share must be from 0 to 1, not " + std::to_string(top_share));
        }
        ctx->extra      = { (extra & COREINFER_STAT_NORMALIZED) != 0, (extra & COREINFER_STAT_TOP) != 0, top_share,
                            (extra & COREINFER_STAT_ACTIVE) != 0 };
        ctx->collecting = on;
        ctx->changed();
    });
}

coreinfer_status coreinfer_stats_clear(coreinfer_context * ctx) {
    return guarded([&] {
        alive(ctx).settle();
        for (const Collected & collected : ctx->collected) {
            for (const ggml_backend_buffer_ptr & buffer : collected.buffers) {
                ggml_backend_buffer_clear(buffer.get(), 0);
            }
        }
    });
}

coreinfer_status coreinfer_stats_get(coreinfer_context * ctx, int32_t ffn, coreinfer_stats * result) {
    return guarded([&] {
        ffn_at(ctx, ffn);
        const Collected & collected = ctx->collected[ffn];
        const auto        get       = [](const ggml_tensor * tensor, float * dst) {
            if (dst) {
                ggml_backend_tensor_get(tensor, dst, 0, ggml_nbytes(tensor));
            }
        };
        get(collected.sum, result->sum);
        get(collected.sum_sq, result->sum_sq);
        get(collected.normalized_sq, result->normalized_sq);
        get(collected.top, result->top);
        get(collected.active, result->active);
        get(collected.count, &result->n_tokens);
    });
}

coreinfer_status coreinfer_down_norms(coreinfer_context * ctx, float * norms) {
    return guarded([&] {
        alive(ctx).settle();
        down_norms(ctx->ffns, norms, ctx->n_threads);
    });
}

coreinfer_status coreinfer_core_set(coreinfer_context * ctx, const coreinfer_core * cores, int32_t n_cores) {
    const coreinfer_status status = guarded([&] {
        alive(ctx).settle();
        if (n_cores < 0 || (n_cores > 0 && !cores)) {
            throw Error(COREINFER_INVALID, std::to_string(n_cores) + " core sets at no address or fewer than none");
        }
        set_cores(*ctx, cores, n_cores);
    });
    if (!ctx) {
        return status;
    }
    if (status != COREINFER_OK) {
        for (Core & core : ctx->cores) {
            core = Core();
        }
    }
    ctx->changed();
    return status;
}

coreinfer_status coreinfer_core_use(coreinfer_context * ctx, bool on) {
    return guarded([&] {
        alive(ctx).settle();
        if (ctx->using_core != on) {
            ctx->using_core = on;
            ctx->changed();
        }
    });
}

coreinfer_status coreinfer_repack(coreinfer_context * ctx, bool on) {
    const coreinfer_status status = guarded([&] {
        alive(ctx).settle();
        if (on) {
            make_copies(*ctx);
        } else {
            ctx->copies.clear();
        }
        ctx->using_copies = on;
    });
    if (!ctx) {
        return status;
    }
    if (status != COREINFER_OK) {
        ctx->copies.clear();
        ctx->using_copies = false;
    }
    ctx->changed();
    return status;
}

coreinfer_status coreinfer_repack_use(coreinfer_context * ctx, bool on) {
    return guarded([&] {
        alive(ctx).settle();
        if (ctx->using_copies != on) {
            ctx->using_copies = on;
            ctx->changed();
        }
    });
}

uint64_t coreinfer_repack_bytes(const coreinfer_context * ctx) {
    uint64_t sum = 0;
    if (!ctx) {
        return sum;
    }
    for (const auto & [weights, copy] : ctx->copies) {
        sum += ggml_nbytes(copy.tensor);
    }
    return sum;
}

uint64_t coreinfer_core_bytes(const coreinfer_context * ctx) {
    uint64_t sum = 0;
    for (size_t i = 0; ctx && ctx->llama && i < ctx->ffns.size(); ++i) {
        sum += ctx->cores[i].neurons.empty() ? ctx->ffns[i].n_bytes() : ctx->cores[i].n_bytes();
    }
    return sum;
}

ggml_backend_buffer_type * coreinfer_unread_buffer_type(void) {
    llama_set_unread_buffer_type(unread_buffer_type());
    return unread_buffer_type();
}

coreinfer_status coreinfer_stream_ahead(coreinfer_context * ctx, uint64_t n_bytes) {
    return guarded([&] { stream_of(alive(ctx)).set_ahead(static_cast<size_t>(n_bytes)); });
}

coreinfer_status coreinfer_stream_begin(coreinfer_context * ctx, int32_t n_passes) {
    return guarded([&] {
        if (n_passes < 1) {
            throw Error(COREINFER_INVALID, "streaming is for at least one evaluation");
        }
        stream_of(alive(ctx)).begin(n_passes);
        if (ctx->lookup) {
            ctx->lookup->take_error();
        }
    });
}

coreinfer_status coreinfer_stream_end(coreinfer_context * ctx, coreinfer_stream * result) {
    return guarded([&] {
        WeightStream &              stream  = stream_of(alive(ctx));
        const WeightStream::Figures figures = stream.figures();
        if (result) {
            *result = { figures.n_bytes, figures.read_seconds, figures.waited_seconds };
        }
        const std::optional<Error> of_rows = ctx->lookup ? ctx->lookup->take_error() : std::nullopt;
        stream.end();
        if (of_rows) {
            throw *of_rows;
        }
    });
}

coreinfer_status coreinfer_memory_get(const llama_context * llama, coreinfer_memory * result) {
    return guarded([&] {
        if (!llama || !result) {
            throw Error(COREINFER_INVALID, "a llama_context and a place for the result are needed");
        }
        *result = {};
        for (const auto & [type, size] : llama_get_memory_breakdown(llama)) {
            result->weights += type == unread_buffer_type() ? 0 : size.model;
            result->cache += size.context;
            result->compute += size.compute;
        }
    });
}
