#include "hook.h"

#include "context.h"
#include "ggml-cpu-alone.h"
#include "unread_buffer.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

namespace coreinfer {

namespace {

bool is_vector(const ggml_tensor * tensor, int64_t n) {
    return tensor->type == GGML_TYPE_F32 && ggml_is_vector(tensor) && tensor->ne[0] == n;
}

// Whether this is the FFN of a layer, and not the shared expert beside others, which are read all the same.
bool is_dense(const llama_ffn & ffn) {
    const std::string name   = ggml_get_name(ffn.down);
    const std::string suffix = ".ffn_down.weight";
    return name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// nullptr for the CPU.
ggml_backend_dev_t layer_device(const llama_context * llama, int layer) {
    ggml_backend_dev_t device = llama_layer_device(llama, layer);
    return device && ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU ? device : nullptr;
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
    ctx.ffns.push_back({ ffn.il, fused, ffn.up, ffn.up_b, ffn.gate, ffn.gate_b, ffn.down, ffn.down_b,
                         layer_device(ctx.llama, ffn.il), *up, gate ? *gate : FileTensor(), *down });
}

void fetch(ggml_tensor *, int ith, int nth, void * data) {
    const auto & at = *static_cast<const Fetch *>(data);
    at.stream->load(at.ffn, ith, nth);
}

// The same where a device computes the layer: the input comes from there, and goes back.
void fetch_and_pass(ggml_tensor * passed, int ith, int nth, void * data) {
    if (ith == 0) {
        std::memcpy(passed->data, passed->src[0]->data, ggml_nbytes(passed));
    }
    fetch(passed, ith, nth, data);
}

// The input of the FFN passes through a node that fetches the weights: no product with them comes before it.
void stream_weights(coreinfer_context & ctx, size_t i, ggml_context * ctx0, llama_ffn & ffn) {
    const WeightStream::Tensors & tensors = ctx.stream->tensors(i);

    if (ctx.ffns[i].device) {
        ggml_tensor * input = ggml_cont(ctx0, ffn.input);
        ffn.input = ggml_custom_4d(ctx0, input->type, input->ne[0], input->ne[1], input->ne[2], input->ne[3], &input, 1,
                                   fetch_and_pass, GGML_N_TASKS_MAX, &ctx.fetches[i]);
    } else {
        ffn.input = ggml_custom_inplace(ctx0, ffn.input, nullptr, 0, fetch, GGML_N_TASKS_MAX, &ctx.fetches[i]);
    }
    ffn.up   = tensors.up;
    ffn.gate = tensors.gate;
    ffn.down = tensors.down;
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
    if (!ctx.uses_core(ctx.graph) || ctx.cores[it->second].neurons.empty()) {
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
    ffn->also   = core.also.data();
    ffn->n_also = static_cast<int>(core.also.size());
}

void on_activation(void * data, ggml_context * ctx0, ggml_cgraph * gf, ggml_tensor * act, const ggml_tensor * down) {
    auto &     ctx = *static_cast<coreinfer_context *>(data);
    const auto it  = ctx.by_down.find(down);
    if (!ctx.collecting || it == ctx.by_down.end() || act->ne[0] != down->ne[0] || act->type != GGML_TYPE_F32) {
        return;
    }
    if (ctx.graph == COREINFER_DRAFT) {
        return; // the tokens come again, to be verified
    }
    if (ctx.uses_core(ctx.graph) && !ctx.cores[it->second].neurons.empty()) {
        return; // padding can make the compact activation as wide as the dense one
    }
    add_collecting_nodes(ctx0, gf, ctx.collected[it->second], act);
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

// The weights that lie far from the device of their layer, and this device's backend.
std::map<const ggml_tensor *, ggml_backend_t> far_weights(const coreinfer_context & ctx, ggml_backend_sched_t sched) {
    std::map<ggml_backend_dev_t, ggml_backend_t> backends;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        backends.emplace(ggml_backend_get_device(backend), backend);
    }
    std::map<const ggml_tensor *, ggml_backend_t> result;
    for (const Ffn & ffn : ctx.ffns) {
        const auto found = backends.find(ffn.device);
        if (!ffn.is_far() || found == backends.end()) {
            continue;
        }
        for (const ggml_tensor * weights : { ffn.up, ffn.gate, ffn.down }) {
            if (weights) {
                result[weights] = found->second;
            }
        }
    }
    return result;
}

bool copy_ahead(ggml_backend_t backend, const ggml_tensor * weights, ggml_tensor * dst, const ggml_tensor * next,
                void * data) {
    return static_cast<WeightsAhead *>(data)->copy(backend, weights, dst, next);
}

// What is verified gets the bits that it has one token at a time. Of several devices, the scheduler would have the
// first compute with all weights that lie in main memory.
void on_built(void * data, ggml_cgraph * gf, ggml_backend_sched_t sched) {
    const auto & ctx = *static_cast<coreinfer_context *>(data);
    if (ctx.weights_ahead) {
        ggml_backend_sched_set_copy_callback(sched, copy_ahead, ctx.weights_ahead.get());
    }
    const bool there    = ctx.graph == COREINFER_VERIFY_THERE;
    const bool verifies = there || ctx.graph == COREINFER_VERIFY;
    const bool several  = ctx.graph == COREINFER_DENSE && ggml_backend_sched_get_n_backends(sched) > 2;
    if (!verifies && !several) {
        return;
    }
    std::map<const ggml_tensor *, ggml_backend_t> far;
    if (there || several) {
        far = far_weights(ctx, sched);
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (verifies && (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_FLASH_ATTN_EXT)) {
            ggml_cpu_set_alone(node);
        }
        if (const auto it = far.find(node->src[0]);
            it != far.end() && node->op == GGML_OP_MUL_MAT &&
            (there || ggml_backend_dev_offload_op(ggml_backend_get_device(it->second), node))) {
            ggml_backend_sched_set_tensor_backend(sched, node, it->second);
        }
    }
}

void on_released(void * data) {
    auto & ctx = *static_cast<coreinfer_context *>(data);
    ctx.llama  = nullptr;
    // the model may go next
    ctx.lookup.reset();
    ctx.weights_ahead.reset();
}

} // namespace

llama_ffn_hook hook_of(coreinfer_context & ctx) {
    constexpr uint32_t kOthers = 3; // to fetch weights, and the rows of tokens
    return { &ctx,      0,        0,          n_collecting_tensors() + kOthers, on_weights, on_activation, on_product,
             on_lookup, on_built, on_released };
}

} // namespace coreinfer
