// Compact tensors against plain copies of the rows and columns of the file.

#include "gather.h"
#include "check.h"
#include "error.h"
#include "gguf.h"
#include "kernels/low_bits.h"
#include "kernels/packed_weights.h"
#include "model.h"
#include "placement.h"
#include "quant.h"
#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

using namespace coreinfer;
using namespace test;

namespace {

struct FfnShape {
    ggml_type type;
    int64_t   n_in;
    int64_t   n_ff;
    int64_t   n_out;
    bool      gated  = true;
    bool      fused  = false;
    bool      biases = true;
};

// An FFN in a file, and as a model would have it loaded.
class TestFfn {
  public:
    explicit TestFfn(const FfnShape & of, uint32_t seed = 1) : shape(of), random(seed) {
        const int64_t n_up = of.fused ? 2 * of.n_ff : of.n_ff;

        std::vector<NamedTensor> tensors = {
            { "before", GGML_TYPE_F32, { 5 }, random.weights(GGML_TYPE_F32, 5) },
            { "up", of.type, { of.n_in, n_up }, random.weights(of.type, of.n_in * n_up) },
            { "down", of.type, { of.n_ff, of.n_out }, random.weights(of.type, of.n_ff * of.n_out) },
        };
        if (of.gated) {
            tensors.push_back({ "gate", of.type, { of.n_in, of.n_ff }, random.weights(of.type, of.n_in * of.n_ff) });
        }
        gguf_context_ptr keys(gguf_init_empty());
        write_gguf(file.path(), keys.get(), tensors);
        for (const NamedTensor & tensor : tensors) {
            bytes[tensor.name] = tensor.data;
        }
        files_ = std::make_unique<TensorFiles>(std::vector<std::string>{ file.path() });

        ctx_.reset(ggml_init({ ggml_tensor_overhead() * 8, nullptr, /*.no_alloc =*/true }));
        const auto matrix = [&](const char * name, int64_t n0, int64_t n1) {
            return ggml_set_name(ggml_new_tensor_2d(ctx_.get(), of.type, n0, n1), name);
        };
        const auto vector = [&](bool wanted, int64_t n) {
            return wanted ? ggml_new_tensor_1d(ctx_.get(), GGML_TYPE_F32, n) : nullptr;
        };
        ffn.layer  = 0;
        ffn.fused  = of.fused;
        ffn.up     = matrix("up", of.n_in, n_up);
        ffn.down   = matrix("down", of.n_ff, of.n_out);
        ffn.gate   = of.gated ? matrix("gate", of.n_in, of.n_ff) : nullptr;
        ffn.up_b   = vector(of.biases, n_up);
        ffn.down_b = vector(of.biases, of.n_out);
        ffn.gate_b = vector(of.biases && of.gated, of.n_ff);
        buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), ggml_backend_cpu_buffer_type()));
        up_b   = set_bias(ffn.up_b, n_up);
        gate_b = set_bias(ffn.gate_b, of.n_ff);
        down_b = set_bias(ffn.down_b, of.n_out);

        ffn.up_file   = *files_->find(ffn.up);
        ffn.down_file = *files_->find(ffn.down);
        ffn.gate_file = of.gated ? *files_->find(ffn.gate) : FileTensor();
    }

    Core gather(const std::vector<int32_t> & neurons, const std::vector<float> & fill = {},
                const std::vector<uint8_t> & levels = {}) const {
        std::vector<Core> cores(1);
        cores[0].neurons = neurons;
        cores[0].levels  = levels;
        cores[0].fill    = fill;
        gather_cores({ ffn }, cores, { 0 }, true, 2);
        return std::move(cores[0]);
    }

    // Row i of down as values.
    std::vector<float> down_row(int64_t i) const {
        return row_values(shape.type, bytes.at("down").data() + i * ggml_row_size(shape.type, shape.n_ff), shape.n_ff);
    }

    FfnShape                                    shape;
    Random                                      random;
    TempFile                                    file;
    std::map<std::string, std::vector<uint8_t>> bytes;
    std::vector<float>                          up_b;
    std::vector<float>                          gate_b;
    std::vector<float>                          down_b;
    Ffn                                         ffn;

  private:
    std::vector<float> set_bias(const ggml_tensor * tensor, int64_t n) {
        std::vector<float> values = random.floats(n, 1.0f);
        if (tensor) {
            std::memcpy(tensor->data, values.data(), n * sizeof(float));
        }
        return values;
    }

    std::unique_ptr<TensorFiles> files_;
    ggml_context_ptr             ctx_;
    ggml_backend_buffer_ptr      buffer_;
};

// The rows of weights that a matrix holds, read back by multiplying it with unit vectors.
std::vector<float> multiplied_out(ggml_tensor * matrix) {
    const int64_t    n_in  = matrix->ne[0];
    const int64_t    n_out = matrix->ne[1];
    ggml_context_ptr ctx(
        ggml_init({ ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, /*.no_alloc =*/true }));
    ggml_tensor * units   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_in, n_in);
    ggml_tensor * product = ggml_mul_mat(ctx.get(), matrix, units);
    ggml_cgraph * graph   = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, product);

    ggml_backend_ptr        backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    ggml_backend_buffer_clear(buffer.get(), 0);
    for (int64_t i = 0; i < n_in; ++i) {
        static_cast<float *>(units->data)[i * n_in + i] = 1.0f;
    }
    CHECK(ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS);

    std::vector<float> rows(n_in * n_out);
    for (int64_t row = 0; row < n_out; ++row) {
        for (int64_t i = 0; i < n_in; ++i) {
            rows[row * n_in + i] = static_cast<const float *>(product->data)[i * n_out + row];
        }
    }
    return rows;
}

bool is_plain(const ggml_tensor * tensor) {
    return ggml_backend_buffer_is_host(tensor->buffer);
}

// For a layout that cannot be read back: multiplies, to the accuracy of 8-bit unit vectors.
void check_products(ggml_tensor * compact, const std::vector<uint8_t> & expected, const std::string & what) {
    const std::vector<float> got = multiplied_out(compact);
    for (int64_t row = 0; row < compact->ne[1]; ++row) {
        const std::vector<float> values =
            row_values(compact->type, expected.data() + row * compact->nb[1], compact->ne[0]);
        float largest = 0.0f;
        for (float value : values) {
            largest = std::max(largest, std::fabs(value));
        }
        for (size_t i = 0; i < values.size(); ++i) {
            CHECK(std::fabs(got[row * compact->ne[0] + i] - values[i]) <= 2e-3f * largest,
                  what + ", row " + std::to_string(row) + ", column " + std::to_string(i));
        }
    }
}

// For a layout that is not ggml's plain one.
void check_layout(ggml_tensor * compact, const std::vector<uint8_t> & expected, const std::string & what) {
    if (!is_packed(compact)) {
        check_products(compact, expected, what);
        return;
    }
    std::vector<uint8_t> packed(expected.size());
    pack_rows(*chosen_kernels(), compact->type, expected.data(), compact->ne[1], compact->ne[0], packed.data());
    CHECK(std::memcmp(compact->data, packed.data(), packed.size()) == 0, what);
}

std::vector<uint8_t> expected_rows(const TestFfn & from, const std::vector<uint8_t> & bytes, int64_t n_parts,
                                   const std::vector<int32_t> & neurons, int64_t n_pad) {
    const size_t         row_size = ggml_row_size(from.shape.type, from.shape.n_in);
    std::vector<uint8_t> expected(n_parts * n_pad * row_size, 0);
    for (int64_t part = 0; part < n_parts; ++part) {
        for (size_t i = 0; i < neurons.size(); ++i) {
            std::memcpy(expected.data() + (part * n_pad + i) * row_size,
                        bytes.data() + (part * from.shape.n_ff + neurons[i]) * row_size, row_size);
        }
    }
    return expected;
}

void check_rows(const TestFfn & from, ggml_tensor * compact, const std::vector<uint8_t> & expected,
                const std::string & what) {
    CHECK(compact->type == from.shape.type && compact->ne[0] == from.shape.n_in, what);
    CHECK(ggml_nbytes(compact) == expected.size(), what);
    if (is_plain(compact)) {
        CHECK(std::memcmp(compact->data, expected.data(), expected.size()) == 0, what);
    } else {
        check_layout(compact, expected, what);
    }
}

void check_columns(const TestFfn & from, ggml_tensor * compact, const std::vector<int32_t> & neurons, int64_t n_pad,
                   const std::string & what) {
    CHECK(compact->type == coreinfer_column_type(from.shape.type), what);
    CHECK(compact->ne[0] == n_pad && compact->ne[1] == from.shape.n_out, what);
    std::vector<uint8_t> expected;
    for (int64_t row = 0; row < from.shape.n_out; ++row) {
        const std::vector<float> weights = from.down_row(row);
        std::vector<float>       kept(n_pad, 0.0f);
        for (size_t i = 0; i < neurons.size(); ++i) {
            kept[i] = weights[neurons[i]];
        }
        if (is_plain(compact)) {
            const auto * got = static_cast<const uint8_t *>(compact->data) + row * compact->nb[1];
            CHECK(holds_values(compact->type, got, kept), what + ", row " + std::to_string(row));
        }
        std::vector<uint8_t> bytes(compact->nb[1]);
        quantize_row(compact->type, kept.data(), bytes.data(), n_pad);
        CHECK(holds_values(compact->type, bytes.data(), kept), what + ", row " + std::to_string(row));
        expected.insert(expected.end(), bytes.begin(), bytes.end());
    }
    if (!is_plain(compact)) {
        check_layout(compact, expected, what);
    }
}

void check_vector(const ggml_tensor * got, const std::vector<float> & expected, const std::string & what) {
    CHECK(got && ggml_nbytes(got) == expected.size() * sizeof(float), what);
    CHECK(std::memcmp(got->data, expected.data(), ggml_nbytes(got)) == 0, what);
}

std::vector<float> expected_bias(const std::vector<float> & bias, int64_t n_parts, int64_t n_ff,
                                 const std::vector<int32_t> & neurons, int64_t n_pad) {
    std::vector<float> expected(n_parts * n_pad, 0.0f);
    for (int64_t part = 0; part < n_parts; ++part) {
        for (size_t i = 0; i < neurons.size(); ++i) {
            expected[part * n_pad + i] = bias[part * n_ff + neurons[i]];
        }
    }
    return expected;
}

void check_core(const TestFfn & from, const Core & core, const std::vector<float> & fill) {
    const FfnShape &  shape   = from.shape;
    const std::string what    = std::string(ggml_type_name(shape.type)) + ", " + std::to_string(core.neurons.size()) +
                                " of " + std::to_string(shape.n_ff);
    const int64_t     n_pad   = (static_cast<int64_t>(core.neurons.size()) + 31) / 32 * 32;
    const int64_t     n_parts = shape.fused ? 2 : 1;

    check_rows(from, core.up, expected_rows(from, from.bytes.at("up"), n_parts, core.neurons, n_pad), what + ", up");
    check_columns(from, core.down, core.neurons, n_pad, what + ", down");
    CHECK(!core.gate == !shape.gated, what);
    if (core.gate) {
        check_rows(from, core.gate, expected_rows(from, from.bytes.at("gate"), 1, core.neurons, n_pad),
                   what + ", gate");
    }
    CHECK(!core.up_b == !shape.biases && !core.gate_b == !(shape.biases && shape.gated), what);
    if (core.up_b) {
        check_vector(core.up_b, expected_bias(from.up_b, n_parts, shape.n_ff, core.neurons, n_pad), what + ", up_b");
    }
    if (core.gate_b) {
        check_vector(core.gate_b, expected_bias(from.gate_b, 1, shape.n_ff, core.neurons, n_pad), what + ", gate_b");
    }
    CHECK(!core.down_b == (!shape.biases && fill.empty()), what);
    for (int64_t row = 0; core.down_b && row < shape.n_out; ++row) {
        const std::vector<float> weights = from.down_row(row);
        double                   sum     = shape.biases ? from.down_b[row] : 0.0;
        double                   size    = std::fabs(sum);
        for (int64_t i = 0; i < (fill.empty() ? 0 : shape.n_ff); ++i) {
            if (!std::binary_search(core.neurons.begin(), core.neurons.end(), i)) {
                sum += static_cast<double>(weights[i]) * fill[i];
                size += std::fabs(static_cast<double>(weights[i]) * fill[i]);
            }
        }
        CHECK(std::fabs(static_cast<const float *>(core.down_b->data)[row] - sum) <= 1e-6 * size, what + ", down_b");
    }
}

// A core of each size that is at the edge of something.
void check_sizes(const FfnShape & shape) {
    TestFfn    from(shape);
    const auto n_ff = static_cast<int32_t>(shape.n_ff);
    for (int32_t n : { 1, 31, 32, 33, n_ff - 1, n_ff }) {
        const std::vector<int32_t> neurons = from.random.neurons(n, n_ff);
        const std::vector<float>   fill    = n % 2 ? from.random.floats(n_ff, 0.5f) : std::vector<float>();
        check_core(from, from.gather(neurons, fill), fill);
    }
}

} // namespace

TEST(cores_of_every_size_and_type_hold_the_rows_and_columns_of_the_file) {
    for (ggml_type type : weight_types()) {
        const int64_t block = ggml_blck_size(type);
        check_sizes({ type, block == 1 ? 67 : 3 * block, block == 1 ? 100 : block == 256 ? 512 : 5 * block, 40 });
    }
}

TEST(cores_of_widths_that_no_repacked_layout_takes_hold_the_same) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                            GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL }) {
        const int64_t block = ggml_blck_size(type);
        check_sizes({ type, 3 * block, std::max<int64_t>(block, 32) * 3, 7 });
        check_sizes({ type, block, std::max<int64_t>(block, 32) * 2, 1 });
    }
}

TEST(cores_of_ffns_without_gate_or_biases_or_with_a_fused_gate_hold_the_same) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1, GGML_TYPE_Q4_K }) {
        const int64_t n_in = ggml_blck_size(type) == 1 ? 50 : ggml_blck_size(type);
        const int64_t n_ff = ggml_blck_size(type) == 256 ? 256 : 96;
        check_sizes({ type, n_in, n_ff, 24, /*.gated =*/false, /*.fused =*/false, /*.biases =*/true });
        check_sizes({ type, n_in, n_ff, 24, /*.gated =*/false, /*.fused =*/false, /*.biases =*/false });
        check_sizes({ type, n_in, n_ff, 24, /*.gated =*/false, /*.fused =*/true, /*.biases =*/true });
        check_sizes({ type, n_in, n_ff, 24, /*.gated =*/true, /*.fused =*/false, /*.biases =*/false });
    }
}

namespace {

// The weights of n_rows rows at a level, each of n.
std::vector<float> at_level(coreinfer_level level, ggml_type full, const std::vector<float> & rows, int64_t n) {
    std::vector<float> result(rows.size());
    for (size_t at = 0; at < rows.size(); at += n) {
        if (level == COREINFER_LEVEL_FULL && !is_low(full)) {
            std::vector<uint8_t> row(ggml_row_size(full, n));
            quantize_row(full, rows.data() + at, row.data(), n);
            dequantize_row(full, row.data(), result.data() + at, n);
        } else {
            const ggml_type      low = level == COREINFER_LEVEL_FULL ? full : low_type(level);
            std::vector<uint8_t> row(row_size(low, n));
            quantize_low_row(low, rows.data() + at, n, row.data());
            dequantize_low_row(low, row.data(), n, result.data() + at);
        }
    }
    return result;
}

// To the accuracy of 8-bit unit vectors.
void check_near(const float * got, const float * expected, int64_t n, const std::string & what) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        largest = std::max(largest, std::fabs(expected[i]));
    }
    for (int64_t i = 0; i < n; ++i) {
        CHECK(std::fabs(got[i] - expected[i]) <= 2e-3f * largest, what + ", " + std::to_string(i));
    }
}

void check_mixed_rows(const TestFfn & from, const Core & core, const char * name, ggml_tensor * compact) {
    const int64_t            n_in = from.shape.n_in;
    const std::vector<float> got  = multiplied_out(compact);
    const size_t             size = ggml_row_size(from.shape.type, n_in);
    int64_t                  row  = 0;
    for (int64_t first = 0; row < compact->ne[1]; first += from.shape.n_ff) {
        for (const Segment & segment : core.segments()) {
            std::vector<float> expected(n_in);
            for (int64_t i = 0; i < segment.n_pad(); ++i, ++row) {
                std::fill(expected.begin(), expected.end(), 0.0f);
                if (i < static_cast<int64_t>(segment.neurons.size())) {
                    expected = row_values(from.shape.type,
                                          from.bytes.at(name).data() + (first + segment.neurons[i]) * size, n_in);
                    if (segment.level != COREINFER_LEVEL_FULL || compact->type != from.shape.type) {
                        expected = at_level(segment.level, compact->type, expected, n_in);
                    }
                }
                check_near(got.data() + row * n_in, expected.data(), n_in, name);
            }
        }
    }
}

void check_mixed(const TestFfn & from, const Core & core) {
    check_mixed_rows(from, core, "up", core.up);
    if (core.gate) {
        check_mixed_rows(from, core, "gate", core.gate);
    }
    const std::vector<float> got   = multiplied_out(core.down);
    const int64_t            n_pad = core.n_pad();
    CHECK(core.down->ne[0] == n_pad);
    for (int64_t row = 0; row < from.shape.n_out; ++row) {
        const std::vector<float> weights = from.down_row(row);
        int64_t                  at      = row * n_pad;
        for (const Segment & segment : core.segments()) {
            std::vector<float> kept(segment.n_pad(), 0.0f);
            for (size_t i = 0; i < segment.neurons.size(); ++i) {
                kept[i] = weights[segment.neurons[i]];
            }
            kept = at_level(segment.level, mixed_column_type(from.shape.type), kept, segment.n_pad());
            check_near(got.data() + at, kept.data(), segment.n_pad(), "down");
            at += segment.n_pad();
        }
    }
}

// So many neurons of each level, mixed.
std::vector<uint8_t> mixed_levels(const std::vector<size_t> & counts) {
    std::vector<uint8_t> levels;
    std::vector<size_t>  left = counts;
    while (std::accumulate(left.begin(), left.end(), size_t(0)) > 0) {
        for (uint8_t level = 0; level < COREINFER_N_LEVELS; ++level) {
            if (left[level] > 0) {
                --left[level];
                levels.push_back(level);
            }
        }
    }
    return levels;
}

} // namespace

TEST(neurons_of_each_level_hold_the_weights_of_the_file_as_the_level_rounds_them) {
    if (!packed_buffer_type()) {
        return; // levels need our kernels
    }
    for (const FfnShape & shape :
         { FfnShape{ GGML_TYPE_Q4_0, 96, 160, 48 }, FfnShape{ GGML_TYPE_Q4_1, 1056, 160, 16 },
           FfnShape{ GGML_TYPE_Q8_0, 64, 160, 32, false, true }, FfnShape{ GGML_TYPE_F16, 96, 160, 32 },
           FfnShape{ GGML_TYPE_BF16, 64, 160, 16, true, false, false },
           FfnShape{ GGML_TYPE_Q5_0, 32, 160, 16, false, false, false },
           FfnShape{ GGML_TYPE_Q4_K, 256, 256, 16, true, false, false }, FfnShape{ GGML_TYPE_Q6_K, 512, 256, 32 } }) {
        TestFfn from(shape);
        for (const std::vector<size_t> & counts : std::vector<std::vector<size_t>>{ { 0, 0, 0, 1 },
                                                                                    { 0, 1, 0, 0 },
                                                                                    { 1, 1, 1, 1 },
                                                                                    { 40, 31, 32, 33 },
                                                                                    { 0, 160, 0, 0 },
                                                                                    { 0, 0, 160, 0 },
                                                                                    { 0, 0, 0, 160 },
                                                                                    { 32, 32, 32, 64 } }) {
            const std::vector<uint8_t> levels = mixed_levels(counts);
            const Core                 core   = from.gather(
                from.random.neurons(static_cast<int32_t>(levels.size()), static_cast<int32_t>(shape.n_ff)), {}, levels);
            check_mixed(from, core);
            CHECK(!core.up_b == !shape.biases && !core.gate_b == !(shape.biases && shape.gated));
            if (core.up_b) {
                std::vector<float> expected;
                for (int64_t first = 0; first < from.ffn.up->ne[1]; first += shape.n_ff) {
                    for (const Segment & segment : core.segments()) {
                        for (int64_t i = 0; i < segment.n_pad(); ++i) {
                            const bool is_pad = i >= static_cast<int64_t>(segment.neurons.size());
                            expected.push_back(is_pad ? 0.0f : from.up_b[first + segment.neurons[i]]);
                        }
                    }
                }
                check_vector(core.up_b, expected, "up_b");
            }
        }
    }
}

static std::vector<float> product_with(ggml_tensor * matrix, const std::vector<float> & x, int n_threads) {
    const int64_t    n_in = matrix->ne[0];
    ggml_context_ptr ctx(ggml_init({ 16 << 20, nullptr, /*.no_alloc =*/false }));
    ggml_tensor *    input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_in, static_cast<int64_t>(x.size()) / n_in);
    std::memcpy(input->data, x.data(), ggml_nbytes(input));
    ggml_tensor * product = ggml_mul_mat(ctx.get(), matrix, input);
    ggml_cgraph * graph   = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, product);
    CHECK(ggml_graph_compute_with_ctx(ctx.get(), graph, n_threads) == GGML_STATUS_SUCCESS);
    const auto * values = static_cast<const float *>(product->data);
    return std::vector<float>(values, values + ggml_nelements(product));
}

TEST(a_product_with_a_mixed_matrix_is_the_same_on_any_number_of_threads) {
    if (!packed_buffer_type()) {
        return;
    }
    TestFfn    from({ GGML_TYPE_Q4_1, 96, 320, 112 });
    const Core core = from.gather(from.random.neurons(200, 320), {}, mixed_levels({ 33, 47, 50, 70 }));
    for (ggml_tensor * matrix : { core.up, core.down }) {
        for (int64_t n_tokens : { 1, 3, 37 }) {
            const std::vector<float> x        = from.random.floats(matrix->ne[0] * n_tokens, 1.0f);
            const std::vector<float> expected = product_with(matrix, x, 1);
            for (int n_threads : { 2, 3, 16 }) {
                CHECK(product_with(matrix, x, n_threads) == expected, std::to_string(n_tokens) + " tokens");
            }
        }
    }
}

TEST(the_bytes_of_a_mixed_core_set_are_those_that_its_neurons_are_said_to_take) {
    if (!packed_buffer_type()) {
        return;
    }
    TestFfn    from({ GGML_TYPE_Q4_1, 1024, 512, 1024, true, false, false });
    const Core core     = from.gather(from.random.neurons(256, 512), {}, mixed_levels({ 64, 64, 64, 64 }));
    float      expected = 0.0f;
    for (uint8_t level : core.levels) {
        expected += neuron_bytes(from.ffn, static_cast<coreinfer_level>(level), true);
    }
    // ggml counts with a mean size of a row; rows of down have steps of their own for each level
    CHECK(std::fabs(static_cast<float>(core.n_bytes()) / expected - 1.0f) < 0.05f, std::to_string(core.n_bytes()));
}

TEST(halves_that_are_all_in_full_are_Q8_0_beside_levels_and_as_stored_without) {
    if (!packed_buffer_type()) {
        return;
    }
    TestFfn    from({ GGML_TYPE_F16, 96, 160, 32 });
    const Core mixed = from.gather(from.random.neurons(64, 160), {}, mixed_levels({ 64, 0, 0, 0 }));
    CHECK(mixed.up->type == GGML_TYPE_Q8_0 && mixed.down->type == GGML_TYPE_Q8_0);
    check_mixed(from, mixed);
    CHECK(from.gather(from.random.neurons(64, 160)).up->type == GGML_TYPE_F16);
    const float bytes = neuron_bytes(from.ffn, COREINFER_LEVEL_FULL, true);
    CHECK(bytes < 0.6f * neuron_bytes(from.ffn, COREINFER_LEVEL_FULL, false));
    CHECK(neuron_bytes(from.ffn, COREINFER_LEVEL_4_BITS, true) < 0.6f * bytes);
}

TEST(weights_are_packed_where_there_are_kernels) {
    TestFfn    from({ GGML_TYPE_Q4_0, 96, 160, 48 });
    const Core core = from.gather(from.random.neurons(64, 160));
    for (const ggml_tensor * tensor : { core.up, core.gate, core.down }) {
        CHECK(is_packed(tensor) == is_packable(GGML_TYPE_Q4_0, tensor->ne[0], tensor->ne[1]));
    }
    check_core(from, core, {});
}

TEST(a_repacked_layout_is_used_where_ggml_has_one) {
    // for Q4_0, in groups of up to 16 rows, if it is built with repacking; 8 are too few for ours
    if (!cpu_layouts().empty() && (ggml_cpu_has_avx2() || ggml_cpu_has_dotprod())) {
        TestFfn    from({ GGML_TYPE_Q4_0, 96, 160, 40 });
        const Core core = from.gather(from.random.neurons(64, 160));
        CHECK(!is_plain(core.down) && !is_packed(core.down));
        check_core(from, core, {});
    }
}

TEST(rows_larger_than_a_chunk_and_gaps_larger_than_one_are_read_right) {
    // rows of 280 000 bytes are read one by one, those of 40 000 six at a time
    for (int64_t n_in : { 70000, 10000 }) {
        TestFfn from({ GGML_TYPE_F32, n_in, 40, 3 });
        for (const std::vector<int32_t> & neurons :
             { std::vector<int32_t>{ 0, 39 }, { 0, 5, 6, 12, 13, 30 }, { 17 }, { 1, 2, 3, 4, 5, 6, 7, 8, 9, 39 } }) {
            check_core(from, from.gather(neurons), {});
        }
    }
    TestFfn from({ GGML_TYPE_F32, 3, 70000, 2 });
    check_core(from, from.gather({ 0, 1, 40000, 69999 }), {});
}

TEST(any_number_of_threads_gathers_the_same) {
    TestFfn                    from({ GGML_TYPE_Q5_0, 64, 160, 40 });
    const std::vector<int32_t> neurons = from.random.neurons(77, 160);
    for (int n_threads : { -1, 0, 1, 2, 3, 64 }) {
        std::vector<Core> cores(3);
        cores[0].neurons = cores[2].neurons = neurons;
        gather_cores({ from.ffn, from.ffn, from.ffn }, cores, { 0, 2 }, true, n_threads);
        check_core(from, cores[0], {});
        check_core(from, cores[2], {});
        CHECK(!cores[1].up && cores[1].buffers.empty() && cores[1].n_bytes() == 0);
    }
}

TEST(the_bytes_of_a_core_are_those_of_its_tensors) {
    TestFfn    from({ GGML_TYPE_Q8_0, 64, 160, 40 });
    const Core core = from.gather({ 1, 2, 3 });
    CHECK(core.n_bytes() == ggml_row_size(GGML_TYPE_Q8_0, 64) * 32 * 2 + ggml_row_size(GGML_TYPE_Q8_0, 32) * 40 +
                                sizeof(float) * (32 + 32 + 40));
    CHECK(from.ffn.n_bytes() == ggml_row_size(GGML_TYPE_Q8_0, 64) * 160 * 2 + ggml_row_size(GGML_TYPE_Q8_0, 160) * 40 +
                                    sizeof(float) * (160 + 160 + 40));
}

TEST(a_file_that_was_cut_is_an_error_on_every_thread) {
    TestFfn from({ GGML_TYPE_Q4_1, 64, 160, 40 });
    from.file.cut_to(0.5);
    for (int n_threads : { 1, 4 }) {
        std::vector<Core> cores(2);
        cores[0].neurons = cores[1].neurons = { 0, 159 };
        try {
            gather_cores({ from.ffn, from.ffn }, cores, { 0, 1 }, true, n_threads);
            CHECK(!"throws");
        } catch (const Error & error) {
            CHECK(error.status == COREINFER_IO);
        }
    }
}

TEST(down_norms_are_the_sums_of_squares_of_the_columns) {
    for (ggml_type type : weight_types()) {
        const int64_t      block = ggml_blck_size(type);
        const int64_t      n_ff  = block == 1 ? 77 : 3 * block;
        const TestFfn      a({ type, block, n_ff, 19 });
        const TestFfn      b({ type, block, n_ff, 8 }, 2);
        std::vector<float> got(2 * n_ff, -1.0f);
        down_norms({ a.ffn, b.ffn }, got.data(), 2);
        const auto check = [&](const TestFfn & from, const float * norms) {
            std::vector<double> expected(n_ff, 0.0);
            for (int64_t row = 0; row < from.shape.n_out; ++row) {
                const std::vector<float> weights = from.down_row(row);
                for (int64_t i = 0; i < n_ff; ++i) {
                    expected[i] += static_cast<double>(weights[i]) * weights[i];
                }
            }
            const double largest = *std::max_element(expected.begin(), expected.end());
            for (int64_t i = 0; i < n_ff; ++i) {
                CHECK(std::fabs(norms[i] - expected[i]) <= 1e-5 * largest, ggml_type_name(type));
            }
        };
        check(a, got.data());
        check(b, got.data() + n_ff);
    }
}
