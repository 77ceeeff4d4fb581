// Packed weights and the kernels that multiply them, against sums in double precision.

#include "kernels/packed_weights.h"
#include "kernels/low_bits.h"

#include "check.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "model.h"
#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

using namespace coreinfer;
using namespace test;

static const std::vector<ggml_type> kPackable = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                                  GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                                  GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS };

namespace {

// Activations as a kernel has them.
struct Input {
    std::vector<int8_t>  values;
    std::vector<float>   scales;
    std::vector<int32_t> starts;
    std::vector<float>   sums;
    std::vector<int32_t> halves;
    int64_t              n_in;

    Input(const PackedKernels & kernels, ggml_type type, const std::vector<float> & x, int64_t of_n_in) :
        values(x.size()),
        scales(x.size() / 32),
        starts(x.size() / 32),
        sums(x.size() / 32),
        halves(x.size() / 16),
        n_in(of_n_in) {
        for (size_t at = 0; at < x.size(); at += n_in) {
            kernels.quantize(x.data() + at, n_in, level_offset(kernels, type), values.data() + at,
                             scales.data() + at / 32, starts.data() + at / 32, sums.data() + at / 32,
                             halves.data() + at / 16);
        }
    }

    QuantizedInput view() const {
        return { values.data(), scales.data(), starts.data(), sums.data(), halves.data(), n_in, n_in };
    }

    double value(size_t i) const { return static_cast<double>(values[i]) * scales[i / 32]; }
};

} // namespace

// Whether out[token * stride + row] is what these weights [n_out][n_in] give with these activations.
static bool is_product(const std::vector<float> & weights, const Input & in, const std::vector<float> & out,
                       int64_t n_out, int64_t stride) {
    const int64_t n_tokens = static_cast<int64_t>(in.values.size()) / in.n_in;
    for (int64_t token = 0; token < n_tokens; ++token) {
        for (int64_t row = 0; row < n_out; ++row) {
            double sum = 0.0;
            double all = 1e-30;
            for (int64_t i = 0; i < in.n_in; ++i) {
                const double term = in.value(token * in.n_in + i) * weights[row * in.n_in + i];
                sum += term;
                all += std::fabs(term);
            }
            if (!(std::fabs(out[token * stride + row] - sum) <= 2e-6 * all)) {
                return false;
            }
        }
    }
    return true;
}

static void check_product(const PackedKernels & kernels, ggml_type type, const std::vector<uint8_t> & rows,
                          const std::vector<float> & x, int64_t n_in, int64_t n_out, const std::string & what) {
    const int64_t            n_tokens = static_cast<int64_t>(x.size()) / n_in;
    const int64_t            stride   = n_out + 5;
    const Input              in(kernels, type, x, n_in);
    std::vector<uint8_t>     packed(rows.size());
    std::vector<float>       out(n_tokens * stride, 77.0f);
    const std::vector<float> weights = row_values(type, rows.data(), n_in * n_out);

    pack_rows(kernels, type, rows.data(), n_out, n_in, packed.data());
    kernels.multiply(type, packed.data(), n_out / kLanes, in.view(), n_tokens, out.data(), stride, false);
    CHECK(is_product(weights, in, out, n_out, stride), what);
    for (int64_t token = 0; token < n_tokens; ++token) {
        for (int64_t i = n_out; i < stride; ++i) {
            CHECK(out[token * stride + i] == 77.0f, what); // nothing is written behind
        }
    }
}

TEST(activations_are_quantised_to_within_half_a_step) {
    Random random(1);
    for (const PackedKernels * kernels : packed_kernels()) {
        std::vector<float> x = random.floats(4 * 32, 3.0f);
        std::fill_n(x.begin() + 32, 32, 0.0f);
        std::fill_n(x.begin() + 64, 32, -1e-42f); // too small to have an inverse
        x[96] = 1e30f;
        const Input in(*kernels, GGML_TYPE_Q4_0, x, 4 * 32);
        for (size_t b = 0; b < 4; ++b) {
            int32_t sum = 0;
            for (size_t i = 32 * b; i < 32 * b + 32; ++i) {
                sum += in.values[i];
                CHECK(std::abs(in.values[i]) <= 127);
                CHECK(std::fabs(x[i] - in.value(i)) <= 0.501 * in.scales[b] + 1e-41, std::to_string(i));
            }
            CHECK(in.starts[b] == -8 * sum && in.halves[2 * b] + in.halves[2 * b + 1] == sum);
            CHECK(in.sums[b] == in.scales[b] * static_cast<float>(sum));
        }
        CHECK(std::all_of(in.values.begin() + 32, in.values.begin() + 96, [](int8_t v) { return v == 0; }));
    }
}

TEST(what_is_not_finite_shows_in_every_product) {
    Random random(4);
    for (const PackedKernels * kernels : packed_kernels()) {
        for (float value : { NAN, -NAN, INFINITY, -INFINITY }) {
            std::vector<float> x = random.floats(64, 1.0f);
            x[40]                = value;
            const Input                in(*kernels, GGML_TYPE_Q4_0, x, 64);
            const std::vector<uint8_t> rows = random.weights(GGML_TYPE_Q4_0, 64 * kLanes);
            std::vector<uint8_t>       packed(rows.size());
            std::vector<float>         out(kLanes);
            pack_rows(*kernels, GGML_TYPE_Q4_0, rows.data(), kLanes, 64, packed.data());
            kernels->multiply(GGML_TYPE_Q4_0, packed.data(), 1, in.view(), 1, out.data(), kLanes, false);
            CHECK(std::none_of(out.begin(), out.end(), [](float y) { return std::isfinite(y); }));
        }
    }
}

TEST(products_of_packed_weights_are_those_of_the_weights) {
    Random random(2);
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : kPackable) {
            for (int64_t n_tokens : { 1, 2, 4, 7, 8, 16, 27, 33 }) {
                for (int64_t n_blocks : { 1, 3, 8 }) {
                    const int64_t     n_in  = n_blocks * ggml_blck_size(type);
                    const int64_t     n_out = 3 * kLanes;
                    const std::string what  = std::string(ggml_type_name(type)) + ", " + std::to_string(n_tokens) +
                                              " tokens, " + std::to_string(n_in) + " wide, " + kernels->name;
                    check_product(*kernels, type, random.weights(type, n_in * n_out),
                                  random.floats(n_in * n_tokens, 2.0f), n_in, n_out, what);
                }
            }
        }
    }
}

// n_out rows in a format of our own, packed, and the weights that they hold.
static std::vector<uint8_t> packed_low(const PackedKernels & kernels, ggml_type type,
                                       const std::vector<float> & weights, int64_t n_in, int64_t n_out,
                                       std::vector<float> & held) {
    const int64_t        size = row_size(type, n_in);
    std::vector<uint8_t> rows(n_out * size);
    std::vector<uint8_t> packed(rows.size());
    held.resize(weights.size());
    for (int64_t row = 0; row < n_out; ++row) {
        quantize_low_row(type, weights.data() + row * n_in, n_in, rows.data() + row * size);
        dequantize_low_row(type, rows.data() + row * size, n_in, held.data() + row * n_in);
    }
    pack_rows(kernels, type, rows.data(), n_out, n_in, packed.data());
    return packed;
}

TEST(products_of_weights_with_3_and_2_bits_are_those_of_the_weights) {
    Random random(7);
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : { kLow3, kLow2 }) {
            for (int64_t n_tokens : { 1, 2, 7, 16, 33 }) {
                for (int64_t n_in : { 32, 96, 1024, 1056, 2112 }) {
                    const int64_t            n_out = 2 * kLanes;
                    const std::vector<float> x     = random.floats(n_in * n_tokens, 2.0f);
                    const Input              in(*kernels, GGML_TYPE_Q4_0, x, n_in);
                    std::vector<float>       weights, out(n_tokens * n_out, 77.0f);
                    const auto               packed =
                        packed_low(*kernels, type, random.floats(n_in * n_out, 1.0f), n_in, n_out, weights);
                    const auto multiply = [&](bool add) {
                        kernels->multiply(type, packed.data(), n_out / kLanes, in.view(), n_tokens, out.data(), n_out,
                                          add);
                    };
                    multiply(false);
                    CHECK(is_product(weights, in, out, n_out, n_out), kernels->name);
                    const std::vector<float> once = out;
                    multiply(true);
                    for (size_t i = 0; i < out.size(); ++i) {
                        CHECK(std::fabs(out[i] - 2.0f * once[i]) <= 1e-3f + 1e-4f * std::fabs(once[i]), kernels->name);
                    }
                }
            }
        }
    }
}

TEST(the_largest_levels_do_not_overflow) {
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0 }) {
            for (float sign : { 1.0f, -1.0f }) {
                const std::vector<float> row(64, 1.0f);
                std::vector<float>       extreme(64, sign);
                extreme[5] = -sign; // a range, for types with a minimum
                std::vector<uint8_t> rows;
                for (int64_t i = 0; i < kLanes; ++i) {
                    const std::vector<uint8_t> bytes = reference_row(type, extreme);
                    rows.insert(rows.end(), bytes.begin(), bytes.end());
                }
                check_product(*kernels, type, rows, row, 64, kLanes, ggml_type_name(type));
            }
        }
    }
}

// The product of a graph with n_threads; x [n_in, n_tokens] with a gap between its rows, if wanted.
static std::vector<float> computed(ggml_type type, const std::vector<uint8_t> & rows, const std::vector<float> & x,
                                   int64_t n_in, int64_t n_out, int n_threads, bool gap) {
    const int64_t           n_tokens = static_cast<int64_t>(x.size()) / n_in;
    ggml_context_ptr        meta(ggml_init({ 16 * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true }));
    ggml_tensor *           weights = ggml_new_tensor_2d(meta.get(), type, n_in, n_out);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(meta.get(), packed_buffer_type()));
    CHECK(is_packed(weights));
    ggml_backend_tensor_set(weights, rows.data(), 0, rows.size());

    ggml_context_ptr ctx(ggml_init({ 16 << 20, nullptr, /*no_alloc*/ false }));
    ggml_tensor *    input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, gap ? n_in + 32 : n_in, n_tokens);
    for (int64_t token = 0; token < n_tokens; ++token) {
        std::memcpy(static_cast<char *>(input->data) + token * input->nb[1], x.data() + token * n_in,
                    n_in * sizeof(float));
    }
    if (gap) {
        input = ggml_view_2d(ctx.get(), input, n_in, n_tokens, input->nb[1], 0);
    }
    if (!gap && n_tokens % 3 == 0) {
        input = ggml_reshape_3d(ctx.get(), input, n_in, n_tokens / 3, 3);
    }
    ggml_tensor * product = ggml_mul_mat(ctx.get(), weights, input);
    CHECK(product->ne[0] == n_out && ggml_nrows(product) == n_tokens && product->ne[2] == input->ne[2]);
    CHECK(!is_packed(product));
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, product);
    const ggml_status status = ggml_graph_compute_with_ctx(ctx.get(), graph, n_threads);
    CHECK(status == GGML_STATUS_SUCCESS);
    const auto * values = static_cast<const float *>(product->data);
    return std::vector<float>(values, values + n_out * n_tokens);
}

TEST(a_node_of_a_graph_gives_the_same_on_any_number_of_threads) {
    if (!packed_buffer_type()) {
        return; // another processor: nothing is packed
    }
    Random              random(3);
    const ggml_type     type    = GGML_TYPE_Q4_1;
    const int64_t       n_in    = 96;
    const int64_t       n_out   = 5 * kLanes;
    const auto          rows    = random.weights(type, n_in * n_out);
    const PackedKernels kernels = *packed_kernels().front(); // they quantise alike
    for (int64_t n_tokens : { 1, 6, 37 }) {
        const std::vector<float> x        = random.floats(n_in * n_tokens, 1.0f);
        const std::vector<float> expected = computed(type, rows, x, n_in, n_out, 1, false);
        CHECK(is_product(row_values(type, rows.data(), n_in * n_out), Input(kernels, type, x, n_in), expected, n_out,
                         n_out));
        for (int n_threads : { 2, 3, 8 }) {
            CHECK(computed(type, rows, x, n_in, n_out, n_threads, false) == expected, std::to_string(n_threads));
            CHECK(computed(type, rows, x, n_in, n_out, n_threads, true) == expected, std::to_string(n_threads));
        }
    }
}

TEST(levels_of_bytes_are_packed_as_the_kernels_count_them) {
    PackedKernels with_signs    = {};
    PackedKernels without_signs = {};
    without_signs.byte_offset   = 128;
    CHECK(level_offset(with_signs, GGML_TYPE_Q8_0) == 0 && level_offset(without_signs, GGML_TYPE_Q8_0) == 128);

    const std::vector<uint8_t> rows = Random(6).weights(GGML_TYPE_Q8_0, 32 * kLanes);
    std::vector<uint8_t>       a(rows.size());
    std::vector<uint8_t>       b(rows.size());
    pack_rows(with_signs, GGML_TYPE_Q8_0, rows.data(), kLanes, 32, a.data());
    pack_rows(without_signs, GGML_TYPE_Q8_0, rows.data(), kLanes, 32, b.data());
    for (size_t i = 0; i < a.size(); ++i) {
        const bool is_scale = i < 2 * kLanes;
        CHECK(static_cast<uint8_t>(a[i] ^ (is_scale ? 0 : 0x80)) == b[i], std::to_string(i));
    }
    // the first four levels of the second row are in its lane
    CHECK(std::equal(a.begin() + 2 * kLanes + 4, a.begin() + 2 * kLanes + 8, rows.begin() + 34 + 2));
}

TEST(only_types_and_shapes_with_a_kernel_are_packed) {
    const bool any = packed_buffer_type() != nullptr;
    if (std::getenv("COREINFER_KERNELS")) {
        return; // which may leave out some
    }
    CHECK(any == !packed_kernels().empty());
    CHECK(is_packable(GGML_TYPE_Q4_0, 64, 32) == any);
    CHECK(is_packable(GGML_TYPE_Q4_K, 512, 16) == any);
    CHECK(is_packable(GGML_TYPE_Q8_0, 64, 32) == any);
    CHECK(!is_packable(GGML_TYPE_Q4_0, 64, 24));
    CHECK(!is_packable(GGML_TYPE_Q4_0, 48, 32));
    CHECK(!is_packable(GGML_TYPE_Q4_K, 128, 32));
    for (ggml_type type : weight_types()) {
        const bool listed = std::find(kPackable.begin(), kPackable.end(), type) != kPackable.end();
        CHECK(listed || !is_packable(type, 256, 32), ggml_type_name(type));
    }
}
