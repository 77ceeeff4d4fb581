#include "kernels/packed_weights.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-layout.h"
#include "mapped_pages.h"
#include "parallel.h"
#include "quant.h"
#include "unread_buffer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <optional>

#ifdef __linux__
#    include <sys/mman.h>
#    include <unistd.h>
#endif

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

// What this thread loads into this layout.
struct Loading {
    bool                       weights   = false;
    bool                       embedding = false;
    std::optional<MappedPages> pages; // of the files
};

static thread_local Loading loading;

void load_packed(bool on, bool tied) {
    loading = { on, on && tied, std::nullopt };
    if (on) {
        loading.pages.emplace();
    }
}

// Bytes that a thread packs before it gives the pages of the file back, about.
constexpr size_t kPackedAtOnce = 1 << 20;

// Whole rows, from a multiple of kLanes on.
static void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const size_t group_size = kLanes * tensor->nb[1];
    GGML_ASSERT(offset % group_size == 0 && size % group_size == 0);
    const auto * rows       = static_cast<const uint8_t *>(data);
    const size_t most       = std::max<size_t>(1, kPackedAtOnce / group_size) * group_size;
    const int    n_threads  = loading.weights ? static_cast<int>(std::thread::hardware_concurrency()) : 1;
    const bool   is_of_file = loading.pages && loading.pages->has(data, size);
    const auto   pack       = [&](size_t i, Scratch &) {
        const size_t done    = i * most;
        const size_t n_bytes = std::min(most, size - done);
        pack_rows(*chosen_kernels(), tensor->type, rows + done, static_cast<int64_t>(n_bytes / tensor->nb[1]),
                  tensor->ne[0], static_cast<uint8_t *>(tensor->data) + offset + done);
        if (is_of_file) {
            give_back(const_cast<uint8_t *>(rows + done), n_bytes);
        }
    };
    run_parallel((size + most - 1) / most, n_threads, pack);
    if (is_of_file) {
        loading.pages->give_back(data, size); // what slices have in common too
    }
}

static const Mixed * mixed_of(const ggml_tensor * tensor) {
    return static_cast<const Mixed *>(tensor->extra);
}

static size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const Mixed * mixed = mixed_of(tensor);
    return mixed ? std::max(mixed->n_bytes, ggml_nbytes(tensor)) : ggml_nbytes(tensor);
}

// Reads of much memory then wait less for addresses, and there are fewer first uses of a page.
static void use_huge_pages(void * memory, size_t size) {
#ifdef __linux__
    const auto page  = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const auto end   = (reinterpret_cast<uintptr_t>(memory) + size) / page * page;
    if (start < end) {
        madvise(reinterpret_cast<void *>(start), end - start, MADV_HUGEPAGE);
    }
#else
    (void) memory;
    (void) size;
#endif
}

// Memory as the CPU has it; only what is written to it goes another way.
static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft             = type;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
        use_huge_pages(ggml_backend_buffer_get_base(buffer), size);
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

ggml_type mixed_type(ggml_type type) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ? GGML_TYPE_Q8_0 : type;
}

ggml_type mixed_column_type(ggml_type type) {
    const ggml_type column = mixed_type(column_type(type));
    return column == GGML_TYPE_Q4_0 || column == GGML_TYPE_Q4_1 ? kLow4 : column;
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

static void look_up(const ggml_cpu_layout_thread * thread, ggml_tensor * rows) {
    const ggml_tensor * weights = rows->src[0];
    const ggml_tensor * numbers = rows->src[1];
    const int64_t       n       = ggml_nelements(numbers);
    for (int64_t i = n * thread->ith / thread->nth; i < n * (thread->ith + 1) / thread->nth; ++i) {
        const int32_t row = static_cast<const int32_t *>(numbers->data)[i];
        GGML_ASSERT(row >= 0 && row < weights->ne[1]);
        unpack_row(*chosen_kernels(), weights->type, static_cast<const uint8_t *>(weights->data), row, weights->ne[0],
                   static_cast<float *>(rows->data) + i * weights->ne[0]);
    }
}

// It must not throw: a thread of ggml's would end the process.
static void compute(const ggml_cpu_layout_thread * thread, ggml_tensor * node) {
    if (node->op == GGML_OP_GET_ROWS) {
        look_up(thread, node);
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        attention::compute(chosen_kernels()->attend, *thread, wait_for_all, node);
    } else {
        multiply(thread, node);
    }
}

static size_t work_size(int n_threads, const ggml_tensor * node) {
    if (node->op == GGML_OP_GET_ROWS) {
        return 0;
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        return attention::work_size(n_threads, node);
    }
    const int64_t n_in     = node->src[0]->ne[0];
    const int64_t n_tokens = ggml_nrows(node->src[1]);
    return n_tokens <= kFewTokens ? n_threads * QuantizedTokens::size(n_tokens, n_in)
                                  : kNextSize + QuantizedTokens::size(n_tokens, n_in);
}

// llama.cpp asks with an empty buffer where weights may go. An embedding is looked up; it is packed if it is the output
// too, which need not be in memory twice then. Others stay in the mapped file.
static bool may_load(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT ? loading.weights
                                       : loading.embedding && std::strcmp(node->src[0]->name, "token_embd.weight") == 0;
}

static bool supports(const ggml_tensor * node) {
    const ggml_tensor * weights = node->src[0];
    const ggml_tensor * other   = node->src[1];
    if (ggml_backend_buffer_get_size(weights->buffer) == 0 && !may_load(node)) {
        return false;
    }
    const auto is_fit = mixed_of(weights) ? is_mixable : is_packable;
    if (weights->view_src || !ggml_is_matrix(weights) || !is_fit(weights->type, weights->ne[0], weights->ne[1])) {
        return false;
    }
    return node->op == GGML_OP_MUL_MAT
               ? other->type == GGML_TYPE_F32 && other->nb[0] == sizeof(float)
               : !mixed_of(weights) && other->type == GGML_TYPE_I32 && ggml_is_contiguous(other);
}

// Between a product with weights and attention: biases, norms, positions, views.
constexpr int kMostNodes = 16;

// Whether the queries come from a product with packed weights: then rounding need not be as in llama.cpp.
static bool attends(const ggml_tensor * node) {
    const ggml_tensor * from = node->src[0];
    for (int i = 0; i < kMostNodes && from && from->op != GGML_OP_MUL_MAT; ++i) {
        from = from->src[0];
    }
    return from && from->op == GGML_OP_MUL_MAT && is_packed(from->src[0]) && attention::is_supported(node);
}

// nullptr where ggml has no place for it: another CPU backend than ours.
static ggml_backend_buffer_type_t make_buffer_type() {
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, nullptr, get_alloc_size, nullptr },
        ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
        nullptr,
    };
    static const ggml_cpu_layout layout = { &type, supports, work_size, compute, attends };
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
