#include "kernels/packed_weights.h"

#include "ggml-backend-impl.h"
#include "vector_loops.h"

#include <algorithm>
#include <new>
#include <vector>

namespace coreinfer {

//
// the buffer type
//

static const char * get_name(ggml_backend_buffer_type_t) {
    return "CoreInfer packed";
}

static size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

// Whole rows, from a multiple of kLanes on.
static void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const size_t row_size = tensor->nb[1];
    GGML_ASSERT(offset % (kLanes * row_size) == 0 && size % (kLanes * row_size) == 0);
    pack_rows(*chosen_kernels(), tensor->type, static_cast<const uint8_t *>(data),
              static_cast<int64_t>(size / row_size), tensor->ne[0], static_cast<uint8_t *>(tensor->data) + offset);
}

// Memory as the CPU has it; only what is written to it goes another way.
static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft             = type;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

ggml_backend_buffer_type_t packed_buffer_type() {
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, nullptr, nullptr, nullptr },
        ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
        nullptr,
    };
    return chosen_kernels() ? &type : nullptr;
}

// The widest input that has kernels: one token of it fits on the stack of any thread.
constexpr int64_t kWidest = 1 << 16;

bool is_packable(ggml_type type, int64_t n_in, int64_t n_out) {
    return chosen_kernels() && has_layout(type) && n_in % ggml_blck_size(type) == 0 && n_in <= kWidest &&
           n_out % kLanes == 0;
}

bool is_packed(const ggml_tensor * tensor) {
    return tensor->buffer && ggml_backend_buffer_get_type(tensor->buffer) == packed_buffer_type();
}

//
// the product
//

// How many tokens are quantised at a time: enough to be worth reading the weights, and few enough for the cache.
constexpr int64_t kTokens = 16;

// The memory of quantised activations, as the members of a QuantizedInput need it.
struct Quantized {
    int8_t *  values;
    float *   scales;
    int32_t * starts;
    float *   sums;
    int32_t * halves;

    Quantized(int32_t * memory, int64_t n_tokens, int64_t n_in) {
        const int64_t n_blocks = n_tokens * n_in / 32;
        starts                 = memory;
        scales                 = reinterpret_cast<float *>(memory + n_blocks);
        sums                   = scales + n_blocks;
        halves                 = reinterpret_cast<int32_t *>(sums + n_blocks);
        values                 = reinterpret_cast<int8_t *>(halves + 2 * n_blocks);
    }

    // In numbers of 32 bits.
    static constexpr int64_t size(int64_t n_tokens, int64_t n_in) { return n_tokens * (n_in / 32) * (8 + 5); }
};

// The part of a product that one thread computes: n_groups groups of rows from first on.
struct Part {
    const ggml_tensor * weights;
    ggml_tensor *       dst;
    int64_t             first;
    int64_t             n_groups;
};

static void multiply_part(const Part & part, int32_t * memory, int64_t n_at_once) {
    const PackedKernels & kernels  = *chosen_kernels();
    const ggml_tensor *   weights  = part.weights;
    const ggml_tensor *   x        = part.dst->src[0];
    const int64_t         n_in     = weights->ne[0];
    const int64_t         n_blocks = n_in / 32;
    const int64_t         stride   = part.dst->ne[0];
    const int64_t         n_all    = ggml_nrows(x);
    const Quantized       to(memory, n_at_once, n_in);
    for (int64_t token = 0; token < n_all; token += n_at_once) {
        const int64_t n_tokens = std::min(n_at_once, n_all - token);
        for (int64_t t = 0; t < n_tokens; ++t) {
            kernels.quantize(static_cast<const float *>(x->data) + (token + t) * n_in, n_in,
                             level_offset(kernels, weights->type), to.values + t * n_in, to.scales + t * n_blocks,
                             to.starts + t * n_blocks, to.sums + t * n_blocks, to.halves + t * 2 * n_blocks);
        }
        kernels.multiply(weights->type,
                         static_cast<const uint8_t *>(weights->data) + part.first * kLanes * weights->nb[1],
                         part.n_groups, { to.values, to.scales, to.starts, to.sums, to.halves, n_in }, n_tokens,
                         static_cast<float *>(part.dst->data) + token * stride + part.first * kLanes, stride);
    }
}

// Token by token, in memory that the thread has in any case. A function of its own, so that others do not touch so much
// of the stack.
NOINLINE static void multiply_part_on_stack(const Part & part) {
    int32_t memory[Quantized::size(1, kWidest)];
    multiply_part(part, memory, 1);
}

// Each thread quantises all activations, which costs less than to wait for others, and multiplies a part of the rows.
// It must not throw: a thread of ggml's would end the process.
static void multiply(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto *  weights  = static_cast<const ggml_tensor *>(data);
    const int64_t n_groups = weights->ne[1] / kLanes;
    const int64_t first    = n_groups * ith / nth;
    const Part    part     = { weights, dst, first, n_groups * (ith + 1) / nth - first };
    if (part.n_groups == 0) {
        return;
    }
    thread_local std::vector<int32_t> memory; // fresh pages would cost more than the product
    const int64_t                     n_at_once = std::min(ggml_nrows(dst->src[0]), kTokens);
    try {
        const auto size = static_cast<size_t>(Quantized::size(n_at_once, weights->ne[0]));
        if (memory.size() < size) {
            memory.resize(size);
        }
    } catch (const std::bad_alloc &) {
        multiply_part_on_stack(part);
        return;
    }
    multiply_part(part, memory.data(), n_at_once);
}

// The weights are no source of the node: no backend claims their buffer type, and the scheduler would abort.
ggml_tensor * packed_multiply(ggml_context * ctx, ggml_tensor * weights, ggml_tensor * x) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->ne[0] == weights->ne[0]);
    if (!ggml_is_contiguous(x)) {
        x = ggml_cont(ctx, x);
    }
    return ggml_custom_4d(ctx, GGML_TYPE_F32, weights->ne[1], x->ne[1], x->ne[2], x->ne[3], &x, 1, multiply,
                          GGML_N_TASKS_MAX, weights);
}

} // namespace coreinfer
