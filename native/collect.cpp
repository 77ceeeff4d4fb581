#include "collect.h"

#include "error.h"
#include "placement.h"
#include "statistics.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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

void make_collected(const Extra & extra, const Ffn & ffn, Collected & collected) {
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
    collected.extra  = &extra;
    collected.on_cpu = is_on_cpu(type);
    place({ { &collected.sum, ffn.n_ff() },
            { &collected.sum_sq, ffn.n_ff() },
            { &collected.normalized_sq, ffn.n_ff() },
            { &collected.active, ffn.n_ff() },
            { &collected.count, 1 } },
          collected.on_cpu ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(device));
    place({ { &collected.top, ffn.n_ff() } }, ggml_backend_cpu_buffer_type());
}

} // namespace coreinfer
