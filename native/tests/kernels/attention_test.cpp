// Attention over keys and values in half precision, against sums in double precision.

#include "kernels/attention.h"

#include "check.h"
#include "ggml-cpp.h"
#include "ggml-cpu-layout.h"
#include "ggml-cpu.h"
#include "kernels/packed_weights.h"
#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using namespace coreinfer;
using namespace test;

namespace {

struct Sizes {
    int64_t n_key       = 64;
    int64_t n_value     = 64;
    int64_t n_heads     = 3; // of keys
    int64_t n_shared    = 3;
    int64_t n_tokens    = 1;
    int64_t n_positions = 70;
    int64_t n_streams   = 1;
};

// A node of a graph, and its result as it must be.
struct Attention {
    Sizes              of;
    ggml_context_ptr   ctx{ ggml_init({ 64 << 20, nullptr, /*no_alloc*/ false }) };
    ggml_tensor *      node;
    std::vector<float> expected;

    explicit Attention(const Sizes & sizes, uint32_t seed, bool has_mask = true) : of(sizes) {
        Random     random(seed);
        const auto tensor = [&](ggml_type type, int64_t n0, int64_t n1, int64_t n2, float scale) {
            ggml_tensor *            x      = ggml_new_tensor_4d(ctx.get(), type, n0, n2, n1, of.n_streams);
            const std::vector<float> values = random.floats(ggml_nelements(x), scale);
            if (type == GGML_TYPE_F16) {
                ggml_fp32_to_fp16_row(values.data(), static_cast<ggml_fp16_t *>(x->data), ggml_nelements(x));
            } else {
                std::memcpy(x->data, values.data(), ggml_nbytes(x));
            }
            return ggml_permute(ctx.get(), x, 0, 2, 1, 3); // the heads of a token lie beside each other
        };
        ggml_tensor * q = tensor(GGML_TYPE_F32, of.n_key, of.n_tokens, of.n_heads * of.n_shared, 2.0f);
        ggml_tensor * k = tensor(GGML_TYPE_F16, of.n_key, of.n_positions, of.n_heads, 2.0f);
        ggml_tensor * v = tensor(GGML_TYPE_F16, of.n_value, of.n_positions, of.n_heads, 2.0f);
        ggml_tensor * mask =
            has_mask ? ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, of.n_positions, of.n_tokens, 1, of.n_streams)
                     : nullptr;
        for (int64_t i = 0; mask && i < ggml_nelements(mask); ++i) {
            // each token sees those before its own position; the last token of all none
            const int64_t token = i / of.n_positions % of.n_tokens;
            const bool    sees  = i % of.n_positions <= of.n_positions - of.n_tokens + token;
            const bool    none  = of.n_tokens > 1 && token == of.n_tokens - 1;
            static_cast<ggml_fp16_t *>(mask->data)[i] =
                ggml_fp32_to_fp16(none || !sees ? -std::numeric_limits<float>::infinity() : 0.25f * (i % 3));
        }
        const float scale = 1.0f / std::sqrt(static_cast<float>(of.n_key));
        node              = ggml_flash_attn_ext(ctx.get(), q, k, v, mask, scale, 0.0f, 0.0f);
        compute_expected(q, k, v, mask, scale);
    }

    void compute_expected(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * mask,
                          float scale) {
        const auto at = [](const ggml_tensor * x, int64_t i0, int64_t i1, int64_t i2, int64_t i3) -> double {
            const auto * from =
                static_cast<const char *>(x->data) + i0 * x->nb[0] + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3];
            return x->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(*reinterpret_cast<const ggml_fp16_t *>(from))
                                            : *reinterpret_cast<const float *>(from);
        };
        for (int64_t s = 0; s < of.n_streams; ++s) {
            for (int64_t t = 0; t < of.n_tokens; ++t) {
                for (int64_t h = 0; h < of.n_heads * of.n_shared; ++h) {
                    std::vector<double> sums(of.n_value);
                    double              all = 0.0;
                    for (int64_t p = 0; p < of.n_positions; ++p) {
                        double product = 0.0;
                        for (int64_t d = 0; d < of.n_key; ++d) {
                            product += at(q, d, t, h, s) * at(k, d, p, h / of.n_shared, s);
                        }
                        const double weight = std::exp(product * scale + (mask ? at(mask, p, t, 0, s) : 0.0));
                        all += weight;
                        for (int64_t d = 0; d < of.n_value; ++d) {
                            sums[d] += weight * at(v, d, p, h / of.n_shared, s);
                        }
                    }
                    for (const double sum : sums) {
                        expected.push_back(static_cast<float>(all > 0.0 ? sum / all : 0.0));
                    }
                }
            }
        }
    }

    std::vector<float> computed(const PackedKernels & kernels, int n_threads) const {
        std::vector<uint8_t> memory(attention::work_size(n_threads, node));
        std::fill_n(static_cast<float *>(node->data), ggml_nelements(node), 77.0f);
        // one after the other: each waits for nobody
        CHECK(n_threads == 1);
        const ggml_cpu_layout_thread thread = { 0, 1, memory.data(), memory.size(), nullptr };
        attention::compute(kernels.attend, thread, [](const ggml_cpu_layout_thread *) {}, node);
        const auto * values = static_cast<const float *>(node->data);
        return std::vector<float>(values, values + ggml_nelements(node));
    }
};

} // namespace

static bool is_near(const std::vector<float> & a, const std::vector<float> & b) {
    return std::equal(a.begin(), a.end(), b.begin(),
                      [](float x, float y) { return std::fabs(x - y) <= 1e-5f * (1.0f + std::fabs(y)); });
}

TEST(attention_is_the_softmax_of_products_times_values) {
    const Sizes all[] = {
        {},                            // one token
        { 16, 16, 1, 1, 1, 1, 1 },     // one position
        { 64, 64, 3, 3, 1, 64, 1 },    // a chunk
        { 80, 128, 2, 4, 4, 1300, 1 }, // more chunks than spans
        { 128, 80, 2, 1, 5, 131, 1 },  // many tokens
        { 64, 64, 2, 3, 50, 100, 1 },  // several blocks of rows
        { 32, 48, 2, 2, 3, 90, 2 },    // streams
        { 32, 32, 2, 2, 33, 200, 3 },
    };
    for (const PackedKernels * kernels : packed_kernels()) {
        for (const Sizes & sizes : all) {
            for (const bool has_mask : { false, true }) {
                const Attention attention(sizes, 5, has_mask);
                CHECK(attention::is_supported(attention.node));
                CHECK(is_near(attention.computed(*kernels, 1), attention.expected),
                      std::string(kernels->name) + ", " + std::to_string(sizes.n_tokens) + " tokens, " +
                          std::to_string(sizes.n_positions) + " positions");
            }
        }
    }
}

TEST(what_is_not_finite_shows_in_attention) {
    for (const PackedKernels * kernels : packed_kernels()) {
        const Attention attention({}, 6, false);
        auto *          q            = static_cast<float *>(attention.node->src[0]->data);
        q[5]                         = NAN; // of the first head
        const std::vector<float> got = attention.computed(*kernels, 1);
        CHECK(std::all_of(got.begin(), got.begin() + 64, [](float x) { return std::isnan(x); }));
        CHECK(std::all_of(got.begin() + 64, got.end(), [](float x) { return std::isfinite(x); }));
    }
}

TEST(attention_of_other_types_and_with_biases_stays_with_ggml) {
    const Attention attention({}, 7);
    ggml_tensor     other = *attention.node;
    ggml_tensor     keys  = *attention.node->src[1];
    keys.type             = GGML_TYPE_Q8_0;
    other.src[1]          = &keys;
    CHECK(!attention::is_supported(&other));
    other      = *attention.node;
    float bias = 8.0f;
    std::memcpy(other.op_params + 1, &bias, sizeof(bias));
    CHECK(!attention::is_supported(&other));
    other        = *attention.node;
    other.src[4] = attention.node->src[0]; // sinks
    CHECK(!attention::is_supported(&other));
}

// In a graph, with queries that come from packed weights.
TEST(attention_in_a_graph_gives_the_same_on_any_number_of_threads) {
    if (!packed_buffer_type()) {
        return;
    }
    const int64_t              n_in = 64;
    const Sizes                of   = { 32, 32, 2, 2, 0, 700, 1 };
    const int64_t              n_q  = of.n_key * of.n_heads * of.n_shared;
    Random                     random(8);
    const std::vector<uint8_t> rows = random.weights(GGML_TYPE_Q4_1, n_in * n_q);
    ggml_context_ptr           meta(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true }));
    ggml_tensor *              weights = ggml_new_tensor_2d(meta.get(), GGML_TYPE_Q4_1, n_in, n_q);
    ggml_backend_buffer_ptr    buffer(ggml_backend_alloc_ctx_tensors_from_buft(meta.get(), packed_buffer_type()));
    ggml_backend_tensor_set(weights, rows.data(), 0, rows.size());
    for (const int64_t n_tokens : { 1, 40 }) {
        const std::vector<float> x        = random.floats(n_in * n_tokens, 1.0f);
        const std::vector<float> cache    = random.floats(of.n_key * of.n_heads * of.n_positions, 1.0f);
        const auto               computed = [&](int n_threads) {
            ggml_context_ptr ctx(ggml_init({ 16 << 20, nullptr, /*no_alloc*/ false }));
            ggml_tensor *    input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_in, n_tokens);
            std::memcpy(input->data, x.data(), ggml_nbytes(input));
            ggml_tensor * k = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, of.n_key, of.n_heads, of.n_positions);
            ggml_fp32_to_fp16_row(cache.data(), static_cast<ggml_fp16_t *>(k->data), ggml_nelements(k));
            ggml_tensor * q = ggml_reshape_3d(ctx.get(), ggml_mul_mat(ctx.get(), weights, input), of.n_key,
                                              of.n_heads * of.n_shared, n_tokens);
            k               = ggml_permute(ctx.get(), k, 0, 2, 1, 3);
            ggml_tensor * node =
                ggml_flash_attn_ext(ctx.get(), ggml_permute(ctx.get(), q, 0, 2, 1, 3), k, k, nullptr, 0.2f, 0.0f, 0.0f);
            ggml_cgraph * graph = ggml_new_graph(ctx.get());
            ggml_build_forward_expand(graph, node);
            CHECK(ggml_graph_compute_with_ctx(ctx.get(), graph, n_threads) == GGML_STATUS_SUCCESS);
            const auto * values = static_cast<const float *>(node->data);
            return std::vector<float>(values, values + ggml_nelements(node));
        };
        const std::vector<float> expected = computed(1);
        CHECK(computed(2) == expected);
        CHECK(computed(5) == expected);
    }
}
