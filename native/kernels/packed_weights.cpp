#include "kernels/packed_weights.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-layout.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

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

static const Mixed * mixed_of(const ggml_tensor * tensor) {
    return static_cast<const Mixed *>(tensor->extra);
}

static size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const Mixed * mixed = mixed_of(tensor);
    return mixed ? std::max(mixed->n_bytes, ggml_nbytes(tensor)) : ggml_nbytes(tensor);
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

std::vector<ggml_backend_buffer_type_t> cpu_layouts() {
    ggml_backend_dev_t cpu  = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto         list = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    std::vector<ggml_backend_buffer_type_t> result;
    for (auto * at = list ? list(cpu) : nullptr; at && *at; ++at) {
        result.push_back(*at);
    }
    return result;
}

// Whether ggml's layout of weights of this type is as fast as ours: Q4_0 with AMX (Sapphire Rapids, 2 cores, 1B Llama:
// 33.4 and 33.2 tok/s, and a faster pre-fill; Q4_K 21 and 29).
static bool is_fast_already(ggml_type type) {
    static const bool has_amx = [] {
        const std::vector<ggml_backend_buffer_type_t> layouts = cpu_layouts();
        return std::any_of(layouts.begin(), layouts.end(), [](ggml_backend_buffer_type_t layout) {
            return std::strcmp(ggml_backend_buft_name(layout), "AMX") == 0;
        });
    }();
    return type == GGML_TYPE_Q4_0 && has_amx;
}

bool is_mixable(ggml_type type, int64_t n_in, int64_t n_out) {
    return packed_buffer_type() && has_layout(type) && n_in % ggml_blck_size(type) == 0 && n_out % kLanes == 0;
}

bool is_packable(ggml_type type, int64_t n_in, int64_t n_out) {
    return is_mixable(type, n_in, n_out) && !is_fast_already(type);
}

void Mixed::add(Part part) {
    part.offset = n_bytes;
    n_bytes += part.n_groups * kLanes * row_size(part.type, part.n_in);
    parts.push_back(part);
}

void make_mixed(ggml_tensor * tensor, const Mixed & mixed) {
    tensor->extra = const_cast<Mixed *>(&mixed);
    // ggml counts bytes with the strides: this is the mean size of a row, but none that ggml takes for transposed
    const size_t row = ggml_row_size(tensor->type, tensor->ne[0]);
    const size_t all = std::max(mixed.n_bytes, row) - row;
    tensor->nb[1]    = std::max(tensor->nb[0], all / static_cast<size_t>(std::max<int64_t>(1, tensor->ne[1] - 1)));
    tensor->nb[2] = tensor->nb[3] = tensor->ne[1] * tensor->nb[1];
}

void set_mixed(ggml_tensor * tensor, const Mixed::Part & part, int64_t group, const uint8_t * rows) {
    const size_t size = kLanes * row_size(part.type, part.n_in);
    pack_rows(*chosen_kernels(), part.type, rows, kLanes, part.n_in,
              static_cast<uint8_t *>(tensor->data) + part.offset + group * size);
}

bool is_packed(const ggml_tensor * tensor) {
    return tensor->buffer && ggml_backend_buffer_get_type(tensor->buffer) == packed_buffer_type();
}

static thread_local bool loads_packed = false;

void load_packed(bool on) {
    loads_packed = on;
}

//
// the product
//

// Of a few tokens each thread quantises all, which costs less than to wait for others.
constexpr int64_t kFewTokens = 4;

// Parts of the rows that each thread takes on average, so that all end at about the same time.
constexpr int64_t kParts = 8;

// Where a part of the work begins that has not been taken; shared by the threads, before the activations.
using Next                 = std::atomic<int64_t>;
constexpr size_t kNextSize = 64;

static void (*wait_for_all)(const ggml_cpu_layout_thread *) = nullptr;

static void quantize_tokens(const ggml_tensor * weights, const ggml_tensor * x, int64_t first, int64_t end,
                            const QuantizedTokens & to) {
    for (int64_t t = first; t < end; ++t) {
        const int64_t i1   = t % x->ne[1];
        const int64_t i2   = t / x->ne[1] % x->ne[2];
        const int64_t i3   = t / x->ne[1] / x->ne[2];
        const auto *  from = static_cast<const uint8_t *>(x->data) + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3];
        to.quantize(*chosen_kernels(), weights->type, t, reinterpret_cast<const float *>(from));
    }
}

// The groups from first on of a part of the weights.
static void multiply_part(const ggml_tensor * product, const QuantizedTokens & in, const Mixed::Part & part,
                          int64_t first, int64_t n_groups) {
    const ggml_tensor * weights = product->src[0];
    if (n_groups > 0) {
        const size_t size = kLanes * row_size(part.type, part.n_in);
        chosen_kernels()->multiply(
            part.type, static_cast<const uint8_t *>(weights->data) + part.offset + (first - part.first_group) * size,
            n_groups, in.input(part.first_in, part.n_in), ggml_nrows(product),
            static_cast<float *>(product->data) + first * kLanes, product->ne[0], part.first_in > 0);
    }
}

// Calls visit for each part of the weights: one, if they are not mixed.
template <typename Visit>
static void for_each_part(const ggml_tensor * weights, Visit visit) {
    if (const Mixed * mixed = mixed_of(weights)) {
        for (const Mixed::Part & part : mixed->parts) {
            visit(part);
        }
    } else {
        visit(Mixed::Part{ weights->type, 0, weights->ne[0], 0, weights->ne[1] / kLanes });
    }
}

static void multiply_groups(const ggml_tensor * product, const QuantizedTokens & in, int64_t first, int64_t end) {
    for_each_part(product->src[0], [&](const Mixed::Part & part) {
        const int64_t from = std::max(first, part.first_group);
        multiply_part(product, in, part, from, std::min(end, part.first_group + part.n_groups) - from);
    });
}

// It must not throw: a thread of ggml's would end the process.
static void multiply(const ggml_cpu_layout_thread * thread, ggml_tensor * product) {
    const ggml_tensor * weights  = product->src[0];
    const ggml_tensor * x        = product->src[1];
    const int64_t       n_in     = weights->ne[0];
    const int64_t       n_tokens = ggml_nrows(x);
    const int64_t       n_groups = weights->ne[1] / kLanes;
    auto * const        memory   = static_cast<uint8_t *>(thread->work);
    if (n_tokens <= kFewTokens) {
        const QuantizedTokens in(memory + thread->ith * QuantizedTokens::size(n_tokens, n_in), n_tokens, n_in);
        quantize_tokens(weights, x, 0, n_tokens, in);
        // of each part the same share, for their groups take unequally long
        for_each_part(weights, [&](const Mixed::Part & part) {
            const int64_t first = part.n_groups * thread->ith / thread->nth;
            const int64_t end   = part.n_groups * (thread->ith + 1) / thread->nth;
            multiply_part(product, in, part, part.first_group + first, end - first);
        });
        return;
    }
    auto &                next = *reinterpret_cast<Next *>(memory);
    const QuantizedTokens in(memory + kNextSize, n_tokens, n_in);
    if (thread->ith == 0) {
        new (&next) Next(0);
    }
    quantize_tokens(weights, x, n_tokens * thread->ith / thread->nth, n_tokens * (thread->ith + 1) / thread->nth, in);
    wait_for_all(thread);
    const int64_t n_part = std::max<int64_t>(1, n_groups / (kParts * thread->nth));
    for (int64_t first; (first = next.fetch_add(n_part)) < n_groups;) {
        multiply_groups(product, in, first, std::min(first + n_part, n_groups));
    }
}

static size_t work_size(int n_threads, const ggml_tensor * product) {
    const int64_t n_in     = product->src[0]->ne[0];
    const int64_t n_tokens = ggml_nrows(product->src[1]);
    return n_tokens <= kFewTokens ? n_threads * QuantizedTokens::size(n_tokens, n_in)
                                  : kNextSize + QuantizedTokens::size(n_tokens, n_in);
}

static bool supports(const ggml_tensor * product) {
    const ggml_tensor * weights = product->src[0];
    const ggml_tensor * x       = product->src[1];
    // llama.cpp asks with an empty buffer where weights may go
    if (ggml_backend_buffer_get_size(weights->buffer) == 0 && !loads_packed) {
        return false;
    }
    const auto is_fit = mixed_of(weights) ? is_mixable : is_packable;
    return !weights->view_src && ggml_is_matrix(weights) && is_fit(weights->type, weights->ne[0], weights->ne[1]) &&
           x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float);
}

// nullptr where ggml has no place for it: another CPU backend than ours.
static ggml_backend_buffer_type_t make_buffer_type() {
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, nullptr, get_alloc_size, nullptr },
        ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
        nullptr,
    };
    static const ggml_cpu_layout layout = { &type, supports, work_size, multiply };
    const auto                   set    = reinterpret_cast<ggml_backend_cpu_set_layout_t>(
        type.device ? ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(type.device),
                                                        "ggml_backend_cpu_set_layout")
                    : nullptr);
    if (!chosen_kernels() || !set) {
        return nullptr;
    }
    set(&layout, &wait_for_all);
    return &type;
}

ggml_backend_buffer_type_t packed_buffer_type() {
    static ggml_backend_buffer_type_t const type = make_buffer_type();
    return type;
}

} // namespace coreinfer
