// ggml's products in the buffer types that the CPU has beside plain memory (repacked, AMX), against plain memory:
// the model's weights and those of a core set lie there.

#include "placement.h"
#include "check.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "kernels/packed_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

using namespace coreinfer;

static ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

static std::vector<ggml_backend_buffer_type_t> extra_buffer_types() {
    packed_buffer_type(); // makes ours known
    return cpu_layouts();
}

static std::vector<float> random_values(int64_t n, unsigned seed) {
    std::mt19937                    engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float>              values(n);
    std::generate(values.begin(), values.end(), [&] { return normal(engine); });
    return values;
}

// The weights, handed over some rows at a time, times x [n_tokens][n_in]; empty where the buffer type does not take
// them. What the result's memory held before is not a number.
static std::vector<float> product(ggml_backend_buffer_type_t type, ggml_type weights_type, int64_t n_in, int64_t n_out,
                                  const std::vector<uint8_t> & rows, int64_t at_once, const std::vector<float> & x) {
    const int64_t    n_tokens = static_cast<int64_t>(x.size()) / n_in;
    ggml_context_ptr of_weights(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead() * 4 + ggml_graph_overhead(), nullptr, true }));
    ggml_tensor *    weights = ggml_new_tensor_2d(of_weights.get(), weights_type, n_in, n_out);

    ggml_backend_buffer_ptr of_type(ggml_backend_alloc_ctx_tensors_from_buft(of_weights.get(), type));
    ggml_tensor *           input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_in, n_tokens);
    ggml_tensor *           out   = ggml_mul_mat(ctx.get(), weights, input);
    CHECK(of_type);
    if (!ggml_backend_dev_supports_op(cpu(), out)) {
        return {};
    }
    ggml_backend_buffer_ptr plain(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    for (int64_t first = 0; first < n_out; first += at_once) {
        ggml_tensor part = rows_of(weights, first, std::min(at_once, n_out - first));
        ggml_backend_tensor_set(&part, rows.data() + first * weights->nb[1], 0, ggml_nbytes(&part));
    }
    const std::vector<float> before(n_out * n_tokens, std::numeric_limits<float>::quiet_NaN());
    ggml_backend_tensor_set(input, x.data(), 0, ggml_nbytes(input));
    ggml_backend_tensor_set(out, before.data(), 0, ggml_nbytes(out));

    ggml_backend_ptr backend(ggml_backend_dev_init(cpu(), nullptr));
    ggml_backend_cpu_set_n_threads(backend.get(), 2);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, out);
    CHECK(ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS);
    std::vector<float> result(out->ne[0] * out->ne[1]);
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    return result;
}

static bool are_near(const std::vector<float> & a, const std::vector<float> & b) {
    double error  = 0.0;
    double square = 1e-30;
    for (size_t i = 0; i < a.size(); ++i) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        square += b[i] * b[i];
    }
    return std::sqrt(error / square) < 0.02; // of activations in 8 bits; false for NaN
}

TEST(products_of_every_shape_in_every_buffer_type_are_near_those_in_plain_memory) {
    const std::vector<ggml_type> types = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0,  GGML_TYPE_Q4_K,
                                           GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS };
    for (ggml_backend_buffer_type_t buffer_type : extra_buffer_types()) {
        for (const ggml_type type : types) {
            for (const int64_t n_in : { 32, 64, 96, 256, 512 }) {
                if (n_in % ggml_blck_size(type) != 0) {
                    continue;
                }
                for (const int64_t n_out : { 32, 96, 192 }) {
                    const std::vector<float> w = random_values(n_in * n_out, 1);
                    std::vector<uint8_t>     rows(ggml_row_size(type, n_in) * n_out);
                    ggml_quantize_chunk(type, w.data(), rows.data(), 0, n_out, n_in, nullptr);
                    for (const int64_t n_tokens : { 1, 2, 16, 17, 31, 32, 33, 64, 70 }) {
                        const std::vector<float> x = random_values(n_in * n_tokens, 2);

                        const std::string name  = std::string(ggml_backend_buft_name(buffer_type)) + " " +
                                                  ggml_type_name(type) + " " + std::to_string(n_in) + " x " +
                                                  std::to_string(n_out) + ", " + std::to_string(n_tokens) + " tokens";
                        const auto        there = product(buffer_type, type, n_in, n_out, rows, n_out, x);
                        if (there.empty()) {
                            continue;
                        }
                        const auto plain = product(ggml_backend_cpu_buffer_type(), type, n_in, n_out, rows, n_out, x);
                        CHECK(are_near(there, plain), name);
                        if (takes_rows(buffer_type, type, n_in)) {
                            const auto in_parts = product(buffer_type, type, n_in, n_out, rows, kRowGroup, x);
                            CHECK(std::memcmp(in_parts.data(), there.data(), there.size() * sizeof(float)) == 0, name);
                        }
                    }
                }
            }
        }
    }
}

TEST(every_buffer_type_of_the_cpu_takes_groups_of_rows) {
    for (ggml_backend_buffer_type_t buffer_type : extra_buffer_types()) {
        for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K }) {
            ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead() * 4, nullptr, /*.no_alloc =*/true }));
            ggml_tensor *    weights = ggml_new_tensor_2d(ctx.get(), type, 512, 64);

            ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(buffer_type, 0));
            weights->buffer = empty.get();
            ggml_tensor * x = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 512, 64);
            if (ggml_backend_dev_supports_op(cpu(), ggml_mul_mat(ctx.get(), weights, x))) {
                CHECK(takes_rows(buffer_type, type, 512),
                      std::string(ggml_backend_buft_name(buffer_type)) + " " + ggml_type_name(type));
            }
        }
    }
}
