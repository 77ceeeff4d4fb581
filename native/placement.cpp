#include "placement.h"

#include "error.h"
#include "kernels/packed_weights.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace coreinfer {

// The buffer types to try for weights that a device computes with (nullptr: the CPU), but for packed ones, the fastest
// first. The CPU has what no device supports.
static std::vector<ggml_backend_buffer_type_t> candidate_buffer_types(ggml_backend_dev_t device) {
    if (device) {
        return { ggml_backend_dev_buffer_type(device), ggml_backend_cpu_buffer_type() };
    }
    std::vector<ggml_backend_buffer_type_t> result = cpu_layouts();
    result.erase(std::remove(result.begin(), result.end(), packed_buffer_type()), result.end());
    result.push_back(ggml_backend_cpu_buffer_type());
    return result;
}

// Whether a matrix product with weights of this shape runs where such a buffer is.
static bool supports_product(ggml_backend_buffer_type_t buffer_type, ggml_type type, int64_t n_in, int64_t n_out) {
    ggml_context_ptr        ctx(ggml_init({ ggml_tensor_overhead() * 4, nullptr, /*.no_alloc =*/true }));
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(buffer_type, 0));
    ggml_backend_dev_t      device = ggml_backend_buft_get_device(buffer_type);
    if (!ctx || !buffer || !device) {
        return false;
    }
    ggml_tensor * weights = ggml_new_tensor_2d(ctx.get(), type, n_in, n_out);
    weights->buffer       = buffer.get();
    ggml_tensor * product = ggml_mul_mat(ctx.get(), weights, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_in, 512));
    return ggml_backend_dev_supports_op(device, product);
}

static ggml_backend_buffer_type_t first_that_supports(const std::vector<ggml_backend_buffer_type_t> & candidates,
                                                      bool packs, ggml_type type, int64_t n_in, int64_t n_out) {
    if (packs && is_packable(type, n_in, n_out)) {
        return packed_buffer_type();
    }
    const auto last = std::prev(candidates.end());
    return *std::find_if(candidates.begin(), last, [&](ggml_backend_buffer_type_t candidate) {
        return supports_product(candidate, type, n_in, n_out);
    });
}

bool runs_on(ggml_backend_dev_t device, ggml_type type, int64_t n_in, int64_t n_out) {
    static std::mutex                                                                  mutex;
    static std::map<std::tuple<ggml_backend_dev_t, ggml_type, int64_t, int64_t>, bool> known;
    const std::lock_guard<std::mutex>                                                  lock(mutex);
    const auto [it, is_new] = known.emplace(std::make_tuple(device, type, n_in, n_out), false);
    if (is_new && type != GGML_TYPE_COUNT) {
        it->second = supports_product(ggml_backend_dev_buffer_type(device), type, n_in, n_out);
    }
    return it->second;
}

ggml_backend_buffer_type_t buffer_type_for(const ggml_tensor * dense, bool packs) {
    return first_that_supports(candidate_buffer_types(nullptr), packs, dense->type, dense->ne[0], dense->ne[1]);
}

ggml_tensor rows_of(const ggml_tensor * tensor, int64_t first, int64_t n) {
    ggml_tensor rows = *tensor;
    rows.ne[1]       = n;
    rows.nb[2] = rows.nb[3] = n * rows.nb[1];
    // a row may take more than in the file: ggml's layouts for AMX have sums beside the weights
    const size_t row_size = ggml_backend_buffer_get_alloc_size(tensor->buffer, tensor) / tensor->ne[1];
    rows.data             = static_cast<uint8_t *>(tensor->data) + first * row_size;
    return rows;
}

static bool try_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in) {
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    if (!ctx) {
        return false;
    }
    ggml_tensor * tensor = ggml_new_tensor_2d(ctx.get(), weights, n_in, 2 * kRowGroup);
    const size_t  size   = ggml_backend_buft_get_alloc_size(type, tensor);
    if (size < ggml_nbytes(tensor) || size % tensor->ne[1] != 0) {
        return false;
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type));
    if (!buffer) {
        return false;
    }
    std::vector<uint8_t> data(ggml_nbytes(tensor));
    for (size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
    }
    const auto * laid_out = static_cast<const uint8_t *>(tensor->data);
    std::memset(tensor->data, 0, size);
    ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
    const std::vector<uint8_t> whole(laid_out, laid_out + size);
    std::memset(tensor->data, 0, size);
    for (int64_t first = 0; first < 2 * kRowGroup; first += kRowGroup) {
        ggml_tensor rows = rows_of(tensor, first, kRowGroup);
        ggml_backend_tensor_set(&rows, data.data() + first * tensor->nb[1], 0, data.size() / 2);
    }
    return std::equal(whole.begin(), whole.end(), laid_out);
}

bool takes_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    if (ggml_backend_buft_is_host(type)) {
        return true;
    }
    if (device && ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return false; // what lies there cannot be looked at
    }
    static std::mutex                                                                 mutex;
    static std::map<std::tuple<ggml_backend_buffer_type_t, ggml_type, int64_t>, bool> known;
    const std::lock_guard<std::mutex>                                                 lock(mutex);
    const auto [it, is_new] = known.emplace(std::make_tuple(type, weights, n_in), false);
    if (is_new) {
        it->second = try_rows(type, weights, n_in);
    }
    return it->second;
}

static ggml_tensor * named(ggml_tensor * tensor, const char * name) {
    ggml_set_name(tensor, name);
    return tensor;
}

Placement::Placement(const Ffn & ffn, bool packs) :
    candidates_(candidate_buffer_types(ffn.device)),
    vectors_(ffn.device ? candidates_.front() : candidates_.back()),
    packs_(packs && !ffn.device) {}

ggml_tensor * Placement::matrix(ggml_type type, int64_t n_in, int64_t n_out, const char * name) {
    ggml_backend_buffer_type_t where = first_that_supports(candidates_, packs_, type, n_in, n_out);
    return named(ggml_new_tensor_2d(context(where), type, n_in, n_out), name);
}

ggml_tensor * Placement::mixed(ggml_type type, int64_t n_in, int64_t n_out, const Mixed & parts, const char * name) {
    ggml_tensor * tensor = ggml_new_tensor_2d(context(packed_buffer_type()), type, n_in, n_out);
    make_mixed(tensor, parts);
    return named(tensor, name);
}

ggml_tensor * Placement::vector(int64_t n, const char * name) {
    return named(ggml_new_tensor_1d(context(vectors_), GGML_TYPE_F32, n), name);
}

void Placement::allocate(Core & core) {
    for (auto & [type, ctx] : contexts_) {
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), type);
        if (!buffer) {
            throw Error(COREINFER_NO_MEMORY,
                        std::string("no memory for the core set in ") + ggml_backend_buft_name(type) + " buffers");
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        core.buffers.emplace_back(buffer);
        core.contexts.push_back(std::move(ctx));
    }
}

// Of a core set: up, gate, down and their biases, of each level.
constexpr size_t kMostTensors = 6 * COREINFER_N_LEVELS;

ggml_context * Placement::context(ggml_backend_buffer_type_t type) {
    ggml_context_ptr & ctx = contexts_[type];
    if (!ctx) {
        ctx.reset(ggml_init({ ggml_tensor_overhead() * kMostTensors, nullptr, /*.no_alloc =*/true }));
        if (!ctx) {
            throw Error(COREINFER_NO_MEMORY, "no memory for the tensors of the core set");
        }
    }
    return ctx.get();
}

} // namespace coreinfer
