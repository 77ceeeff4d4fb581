#include "collect.h"

#include "error.h"
#include "ggml-backend.h"
#include "statistics.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace coreinfer {

namespace {

float * values(const ggml_tensor * tensor) {
    return static_cast<float *>(tensor->data);
}

// On the CPU: each thread measures a part of the tokens. dst is an array of TokenMeasure.
void measure_tokens(ggml_tensor * dst, int ith, int nth, void * data) {
    const Extra &       extra    = *static_cast<const Collected *>(data)->extra;
    const ggml_tensor * act      = dst->src[0];
    auto *              measures = static_cast<TokenMeasure *>(dst->data);

    for (int64_t token = ith; token < act->ne[1]; token += nth) {
        const float * row = values(act) + token * static_cast<int64_t>(act->nb[1] / sizeof(float));
        measures[token]   = measure_token(row, act->ne[0], extra.top ? extra.top_share : 0.0f);
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

} // namespace

void add_collecting_nodes(ggml_context * ctx0, ggml_cgraph * gf, Collected & collected, ggml_tensor * act) {
    const int64_t n_tokens = ggml_nelements(act) / act->ne[0];
    act                    = ggml_reshape_2d(ctx0, act, act->ne[0], n_tokens);

    ggml_tensor * args[] = { act, nullptr };
    int           n_args = 1;
    if (collected.extra->top || (collected.extra->normalized && collected.on_cpu)) {
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
    if (collected.extra->top) {
        add(collected.top, add_top);
    }
}

uint32_t n_collecting_tensors() {
    constexpr size_t kEnough = 128;
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead() * kEnough + ggml_graph_overhead_custom(kEnough, false),
                                     nullptr, /*.no_alloc =*/true }));
    if (!ctx) {
        throw Error(COREINFER_NO_MEMORY, "no memory for the nodes of statistics");
    }
    const Extra all = { true, true, 1.0f, true };
    Collected   collected;
    collected.extra  = &all;
    collected.on_cpu = false;
    for (ggml_tensor ** tensor : { &collected.sum, &collected.sum_sq, &collected.normalized_sq, &collected.active,
                                   &collected.count, &collected.top }) {
        *tensor = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 1);
    }
    const auto n_tensors = [&] {
        uint32_t n = 0;
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            ++n;
        }
        return n;
    };
    ggml_tensor *  act    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 1, 1);
    const uint32_t before = n_tensors();
    add_collecting_nodes(ctx.get(), ggml_new_graph_custom(ctx.get(), kEnough, false), collected, act);
    return n_tensors() - before;
}

StatisticsMemory make_collected(const Extra & extra, const std::vector<Ffn> & ffns, std::vector<Collected> & all) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts;

    const auto vector = [&](ggml_backend_buffer_type_t type, int64_t n) {
        ggml_context_ptr & ctx = contexts[type];
        if (!ctx) {
            constexpr size_t kVectors = 6; // of a Collected
            ctx.reset(ggml_init({ ggml_tensor_overhead() * kVectors * ffns.size(), nullptr, /*.no_alloc =*/true }));
        }
        if (!ctx) {
            throw Error(COREINFER_NO_MEMORY, "no memory for the tensors of statistics");
        }
        return ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    };
    all.resize(ffns.size());
    for (size_t i = 0; i < ffns.size(); ++i) {
        const int64_t                    n_ff   = ffns[i].n_ff();
        const ggml_backend_buffer_type_t host   = ggml_backend_cpu_buffer_type();
        const ggml_backend_buffer_type_t beside = ffns[i].device ? ggml_backend_dev_buffer_type(ffns[i].device) : host;

        Collected & collected   = all[i];
        collected.sum           = vector(beside, n_ff);
        collected.sum_sq        = vector(beside, n_ff);
        collected.normalized_sq = vector(beside, n_ff);
        collected.active        = vector(beside, n_ff);
        collected.count         = vector(beside, 1);
        collected.top           = vector(host, n_ff);
        collected.extra         = &extra;
        collected.on_cpu        = !ffns[i].device;
    }
    StatisticsMemory memory;
    for (auto & [type, ctx] : contexts) {
        memory.buffers.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type));
        if (!memory.buffers.back()) {
            throw Error(COREINFER_NO_MEMORY,
                        std::string("no memory for statistics in ") + ggml_backend_buft_name(type) + " buffers");
        }
        memory.contexts.push_back(std::move(ctx));
    }
    memory.clear();
    return memory;
}

void StatisticsMemory::clear() const {
    for (const ggml_backend_buffer_ptr & buffer : buffers) {
        ggml_backend_buffer_clear(buffer.get(), 0);
    }
}

} // namespace coreinfer
