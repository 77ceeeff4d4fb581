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
#include <map>
#include <string>

using namespace coreinfer;
using namespace test;

static const std::vector<ggml_type> kPackable = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                                  GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                                  GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS };

namespace {

// Activations as a kernel has them.
struct Input {
    int64_t              n_tokens;
    int64_t              n_in;
    int64_t              most; // of a tile
    bool                 pairs;
    std::vector<int64_t> memory;
    QuantizedInput       view;

    Input(const PackedKernels & kernels, ggml_type type, const std::vector<float> & x, int64_t of_n_in) :
        n_tokens(static_cast<int64_t>(x.size()) / of_n_in),
        n_in(of_n_in),
        most(kernels.tile),
        pairs(kernels.pairs),
        memory(QuantizedTokens::size(n_tokens, n_in) / sizeof(int64_t)) {
        const QuantizedTokens tokens(memory.data(), n_tokens, n_in);
        for (int64_t token = 0; token < n_tokens; ++token) {
            tokens.quantize(kernels, type, token, x.data() + token * n_in);
        }
        view = tokens.input();
    }

    double value(int64_t token, int64_t i) const {
        const Tile    tile  = tile_of(token, n_tokens, most);
        const int64_t block = tile.first * (n_in / 32) + i / 32 * tile.width + token - tile.first;
        return static_cast<double>(view.values[value_at(block, i % 32, in_pairs(pairs, tile.width))]) *
               view.scales[block];
    }
};

} // namespace

// Whether out[token * stride + row] is what these weights [n_out][n_in] give with these activations.
static bool is_product(const std::vector<float> & weights, const Input & in, const std::vector<float> & out,
                       int64_t n_out, int64_t stride) {
    for (int64_t token = 0; token < in.n_tokens; ++token) {
        for (int64_t row = 0; row < n_out; ++row) {
            double sum = 0.0;
            double all = 1e-30;
            for (int64_t i = 0; i < in.n_in; ++i) {
                const double term = in.value(token, i) * weights[row * in.n_in + i];
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
    kernels.multiply(type, packed.data(), n_out / kLanes, in.view, n_tokens, out.data(), stride, false);
    CHECK(is_product(weights, in, out, n_out, stride), what);
    for (int64_t token = 0; token < n_tokens; ++token) {
        for (int64_t i = n_out; i < stride; ++i) {
            CHECK(out[token * stride + i] == 77.0f, what); // nothing is written behind
        }
    }
}

#ifdef __aarch64__
TEST(a_processor_that_qemu_emulates_has_the_best_kernels_for_it) {
    const char * const qemu_cpu = std::getenv("QEMU_CPU");
    const std::string  cpu      = qemu_cpu ? qemu_cpu : "";
    for (const auto & [name, best] : std::map<std::string, std::string>{
             { "cortex-a53", "neon" }, { "cortex-a72", "neon" }, { "cortex-a76", "dotprod" }, { "max", "i8mm" } }) {
        if (cpu == name) {
            CHECK(packed_kernels().front()->name == best, name);
        }
    }
}
#endif

TEST(activations_are_quantised_to_within_half_a_step) {
    Random random(1);
    for (const PackedKernels * kernels : packed_kernels()) {
        std::vector<float> x = random.floats(4 * 32, 3.0f);
        std::fill_n(x.begin() + 32, 32, 0.0f);
        std::fill_n(x.begin() + 64, 32, -1e-42f); // too small to have an inverse
        x[96] = 1e30f;
        const Input            in(*kernels, GGML_TYPE_Q4_0, x, 4 * 32);
        const QuantizedInput & all = in.view;
        for (size_t b = 0; b < 4; ++b) {
            int32_t sum = 0;
            for (size_t i = 32 * b; i < 32 * b + 32; ++i) {
                sum += all.values[i];
                CHECK(std::abs(all.values[i]) <= 127);
                CHECK(std::fabs(x[i] - in.value(0, i)) <= 0.501 * all.scales[b] + 1e-41, std::to_string(i));
            }
            CHECK(all.starts[b] == -8 * sum && all.halves[2 * b] + all.halves[2 * b + 1] == sum);
            CHECK(all.sums[b] == all.scales[b] * static_cast<float>(sum));
        }
        CHECK(std::all_of(all.values + 32, all.values + 96, [](int8_t v) { return v == 0; }));
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
            kernels->multiply(GGML_TYPE_Q4_0, packed.data(), 1, in.view, 1, out.data(), kLanes, false);
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

TEST(a_row_of_packed_weights_has_the_values_that_ggml_gives_it) {
    Random random(9);
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : kPackable) {
            for (int64_t n_blocks : { 1, 3, 8 }) {
                const int64_t              n_in  = n_blocks * ggml_blck_size(type);
                const int64_t              n_out = 2 * kLanes;
                const std::vector<uint8_t> rows  = random.weights(type, n_in * n_out);
                std::vector<uint8_t>       packed(rows.size());
                std::vector<float>         got(n_in * n_out);
                pack_rows(*kernels, type, rows.data(), n_out, n_in, packed.data());
                for (int64_t row = 0; row < n_out; ++row) {
                    unpack_row(*kernels, type, packed.data(), row, n_in, got.data() + row * n_in);
                }
                CHECK(got == row_values(type, rows.data(), n_in * n_out), ggml_type_name(type));
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

TEST(products_of_weights_with_4_3_and_2_bits_are_those_of_the_weights) {
    Random random(7);
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : { kLow4, kLow3, kLow2 }) {
            for (int64_t n_tokens : { 1, 2, 7, 16, 33 }) {
                for (int64_t n_in : { 32, 96, 1024, 1056, 2112 }) {
                    const int64_t            n_out = 2 * kLanes;
                    const std::vector<float> x     = random.floats(n_in * n_tokens, 2.0f);
                    const Input              in(*kernels, GGML_TYPE_Q4_0, x, n_in);
                    std::vector<float>       weights, out(n_tokens * n_out, 77.0f);
                    const auto               packed =
                        packed_low(*kernels, type, random.floats(n_in * n_out, 1.0f), n_in, n_out, weights);
                    const auto multiply = [&](bool add) {
                        kernels->multiply(type, packed.data(), n_out / kLanes, in.view, n_tokens, out.data(), n_out,
                                          add);
                    };
                    multiply(false);
                    CHECK(is_product(weights, in, out, n_out, n_out), kernels->name);
                    const std::vector<float> once = out;
                    // a token alone has the same bits
                    const Input alone(*kernels, GGML_TYPE_Q4_0, std::vector<float>(x.end() - n_in, x.end()), n_in);
                    std::vector<float> of_last(n_out);
                    kernels->multiply(type, packed.data(), n_out / kLanes, alone.view, 1, of_last.data(), n_out, false);
                    CHECK(std::equal(of_last.begin(), of_last.end(), once.end() - n_out), kernels->name);
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

// n weights of which all bytes but the scales in half precision are byte, or random if that is negative.
static std::vector<uint8_t> weights_of_bytes(Random & random, ggml_type type, int64_t n, int byte) {
    const size_t         size = ggml_type_size(type);
    std::vector<uint8_t> rows = random.bytes(ggml_row_size(type, n));
    if (byte >= 0) {
        std::fill(rows.begin(), rows.end(), static_cast<uint8_t>(byte));
    }
    const bool has_minimum =
        type == GGML_TYPE_Q4_1 || type == GGML_TYPE_Q5_1 || type == GGML_TYPE_Q4_K || type == GGML_TYPE_Q5_K;
    for (size_t at = type == GGML_TYPE_Q6_K ? 208 : 0; at < rows.size(); at += size) {
        const ggml_fp16_t scales[2] = { ggml_fp32_to_fp16(0.01f + 0.001f * static_cast<float>(random.below(90))),
                                        ggml_fp32_to_fp16(0.02f) };
        std::memcpy(rows.data() + at, scales, has_minimum ? 4 : 2);
    }
    return rows;
}

TEST(levels_and_scales_of_any_bytes_give_their_product) {
    Random random(7);
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : kPackable) {
            for (int byte : { -1, 0, 0x7f, 0x80, 0xff }) {
                for (float largest : { 1.0f, -1.0f, 0.0f, 1e33f, 1e-30f }) { // all values 127, -127, or any
                    for (int64_t n_tokens : { 1, 18 }) {
                        const std::vector<float> x = largest == 0.0f ? random.floats(512 * n_tokens, 1.0f)
                                                                     : std::vector<float>(512 * n_tokens, largest);
                        check_product(*kernels, type, weights_of_bytes(random, type, 512 * 2 * kLanes, byte), x, 512,
                                      2 * kLanes,
                                      std::string(ggml_type_name(type)) + ", byte " + std::to_string(byte) + ", " +
                                          kernels->name);
                    }
                }
            }
        }
    }
}

// Wider than the part of the inputs that is computed at a time, and more groups than stay in a cache.
TEST(the_products_of_a_token_have_the_same_bits_in_any_batch) {
    Random        random(8);
    const int64_t n_in     = 2304;
    const int64_t n_groups = 30;
    const int64_t n_out    = n_groups * kLanes;
    const int64_t n_all    = 39;
    for (const PackedKernels * kernels : packed_kernels()) {
        for (ggml_type type : kPackable) {
            const std::vector<uint8_t> rows = random.weights(type, n_in * n_out);
            std::vector<uint8_t>       packed(rows.size());
            pack_rows(*kernels, type, rows.data(), n_out, n_in, packed.data());
            const std::vector<float> x        = random.floats(n_in * n_all, 1.0f);
            const auto               products = [&](int64_t first, int64_t n_tokens) {
                const auto         from = x.begin() + first * n_in;
                const Input        in(*kernels, type, std::vector<float>(from, from + n_tokens * n_in), n_in);
                std::vector<float> out(n_tokens * n_out);
                kernels->multiply(type, packed.data(), n_groups, in.view, n_tokens, out.data(), n_out, false);
                return out;
            };
            const std::vector<float> expected = products(0, n_all);
            for (int64_t n_tokens : { 1, 2, 3, 16, 21 }) {
                for (int64_t first = 0; first + n_tokens <= n_all; first += n_tokens) {
                    const std::vector<float> got = products(first, n_tokens);
                    CHECK(std::equal(got.begin(), got.end(), expected.begin() + first * n_out),
                          std::string(ggml_type_name(type)) + ", " + std::to_string(n_tokens) + " tokens from " +
                              std::to_string(first) + ", " + kernels->name);
                }
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

TEST(rows_are_looked_up_in_packed_weights) {
    if (!packed_buffer_type()) {
        return;
    }
    const ggml_type            type  = GGML_TYPE_Q4_1;
    const int64_t              n_in  = 96;
    const int64_t              n_out = 5 * kLanes;
    const std::vector<uint8_t> rows  = Random(10).weights(type, n_in * n_out);
    const std::vector<float>   all   = row_values(type, rows.data(), n_in * n_out);
    ggml_context_ptr           meta(ggml_init({ 16 * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true }));
    ggml_tensor *              weights = ggml_new_tensor_2d(meta.get(), type, n_in, n_out);
    ggml_backend_buffer_ptr    buffer(ggml_backend_alloc_ctx_tensors_from_buft(meta.get(), packed_buffer_type()));
    ggml_backend_tensor_set(weights, rows.data(), 0, rows.size());
    const std::vector<int32_t> numbers = { 0, 79, 16, 15, 79, 33, 2 };
    for (int n_threads : { 1, 3 }) {
        ggml_context_ptr ctx(ggml_init({ 1 << 20, nullptr, /*no_alloc*/ false }));
        ggml_tensor *    wanted = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, static_cast<int64_t>(numbers.size()));
        std::memcpy(wanted->data, numbers.data(), ggml_nbytes(wanted));
        ggml_tensor * looked_up = ggml_get_rows(ctx.get(), weights, wanted);
        ggml_cgraph * graph     = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, looked_up);
        CHECK(ggml_graph_compute_with_ctx(ctx.get(), graph, n_threads) == GGML_STATUS_SUCCESS);
        const auto * got = static_cast<const float *>(looked_up->data);
        for (const int32_t number : numbers) {
            CHECK(std::equal(got, got + n_in, all.begin() + number * n_in), std::to_string(number));
            got += n_in;
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
    CHECK(is_packable(GGML_TYPE_Q4_1, 64, 32) == any); // Q4_0 stays with ggml where it has AMX
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
