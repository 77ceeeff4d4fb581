#include "copies.h"

#include "context.h"
#include "error.h"
#include "gather.h"
#include "kernels/packed_weights.h"
#include "parallel.h"
#include "placement.h"

#include <cstring>
#include <string>
#include <utility>

namespace coreinfer {

// Whether ggml's layout of this weight is as fast for one token as ours: Q4_0 with AMX (Sapphire Rapids, 2 cores, 1B
// Llama: 33.4 and 33.2 tok/s; Q4_K 21 and 29).
static bool is_fast_already(const ggml_tensor * weights) {
    const char * layout = ggml_backend_buft_name(ggml_backend_buffer_get_type(weights->buffer));
    return weights->type == GGML_TYPE_Q4_0 && std::strcmp(layout, "AMX") == 0;
}

bool can_copy_packed(const ggml_tensor * weights) {
    if (!weights->buffer || !ggml_is_matrix(weights) || !is_packable(weights->type, weights->ne[0], weights->ne[1])) {
        return false;
    }
    return is_on_cpu(ggml_backend_buffer_get_type(weights->buffer)) && !is_fast_already(weights);
}

std::vector<PackedCopy> copy_packed(const std::vector<const ggml_tensor *> & weights, const TensorFiles & files,
                                    int n_threads) {
    std::vector<PackedCopy> copies(weights.size());
    for (size_t i = 0; i < copies.size(); ++i) {
        PackedCopy & copy = copies[i];
        copy.context.reset(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
        if (copy.context) {
            copy.tensor =
                ggml_new_tensor_2d(copy.context.get(), weights[i]->type, weights[i]->ne[0], weights[i]->ne[1]);
            copy.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(copy.context.get(), packed_buffer_type()));
        }
        if (!copy.buffer) {
            throw Error(COREINFER_NO_MEMORY, std::string("no memory for a copy of ") + ggml_get_name(weights[i]));
        }
    }
    run_parallel(copies.size(), n_threads,
                 [&](size_t i, Scratch & scratch) { copy_whole(*files.find(weights[i]), copies[i].tensor, scratch); });
    return copies;
}

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

} // namespace coreinfer
