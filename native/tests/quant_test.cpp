// Rows of weights to float and back, against ggml and against plain scalar code.

#include "quant.h"

#include "check.h"
#include "coreinfer.h"
#include "model.h"
#include "reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

using namespace coreinfer;
using namespace test;

static const std::vector<ggml_type> kColumnTypes = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                                     GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1 };

static double bits_of(ggml_type type) {
    return 8.0 * static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
}

static bool is_column_type(ggml_type type) {
    return std::find(kColumnTypes.begin(), kColumnTypes.end(), type) != kColumnTypes.end();
}

// Equal but for the last bits, in which a fused multiply and add may differ.
static bool close(float a, float b, float largest) {
    return a == b || std::fabs(a - b) <= 4 * FLT_EPSILON * largest;
}

static float largest_of(const float * values, int64_t n) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        largest = std::max(largest, std::fabs(values[i]));
    }
    return largest;
}

//
// types
//

TEST(columns_of_every_weight_type_are_stored_in_no_fewer_bits) {
    for (ggml_type type : weight_types()) {
        const ggml_type stored = column_type(type);
        CHECK(is_column_type(stored), ggml_type_name(type));
        CHECK(bits_of(stored) >= bits_of(type), ggml_type_name(type));
        CHECK(column_type(stored) == stored, ggml_type_name(type));
        CHECK(!is_column_type(type) || stored == type, ggml_type_name(type));
    }
}

TEST(columns_of_super_blocks_are_stored_in_the_smallest_type_of_no_fewer_bits) {
    const std::vector<std::pair<ggml_type, ggml_type>> expected = {
        { GGML_TYPE_Q2_K, GGML_TYPE_Q4_0 },   { GGML_TYPE_Q3_K, GGML_TYPE_Q4_0 },  { GGML_TYPE_Q4_K, GGML_TYPE_Q4_0 },
        { GGML_TYPE_Q5_K, GGML_TYPE_Q5_1 },   { GGML_TYPE_Q6_K, GGML_TYPE_Q8_0 },  { GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_0 },
        { GGML_TYPE_IQ4_XS, GGML_TYPE_Q4_0 }, { GGML_TYPE_IQ1_S, GGML_TYPE_Q4_0 },
    };
    for (const auto & [type, stored] : expected) {
        CHECK(column_type(type) == stored, ggml_type_name(type));
        CHECK(coreinfer_column_type(type) == stored, ggml_type_name(type));
    }
}

TEST(a_number_that_is_no_type_has_no_column_type) {
    for (int32_t type : { -1, 4, 31, static_cast<int32_t>(GGML_TYPE_COUNT), 1000, INT32_MAX, INT32_MIN }) {
        CHECK(coreinfer_column_type(type) == -1, std::to_string(type));
    }
}

//
// to float
//

TEST(dequantised_rows_of_every_type_equal_those_of_ggml) {
    Random random(1);
    for (ggml_type type : weight_types()) {
        const int64_t block = ggml_blck_size(type);
        for (int64_t n : { block, 3 * block, 40 * block }) {
            // any bytes are a block of weights; where they are not finite, anything may come out
            std::vector<uint8_t> row = random.bytes(ggml_row_size(type, n));
            if (n == 40 * block) {
                row = random.weights(type, n);
            }
            const std::vector<float> expected = row_values(type, row.data(), n);
            std::vector<float>       got(n);
            dequantize_row(type, row.data(), got.data(), n);
            for (int64_t start = 0; start < n; start += block) {
                const float * at = expected.data() + start;
                if (std::all_of(at, at + block, [](float x) { return std::isfinite(x); })) {
                    const float largest = largest_of(at, block);
                    for (int64_t i = 0; i < block; ++i) {
                        CHECK(close(got[start + i], at[i], largest), ggml_type_name(type));
                    }
                }
            }
        }
    }
}

TEST(all_half_precision_values_are_converted_exactly) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto  half     = static_cast<uint16_t>(bits);
        const float expected = ggml_fp16_to_fp32(half);
        float       got      = 0.0f;
        dequantize_row(GGML_TYPE_F16, &half, &got, 1);
        CHECK(!std::isfinite(expected) || got == expected, std::to_string(bits));
    }
}

TEST(zero_bytes_are_zero_weights_in_every_type) {
    for (ggml_type type : weight_types()) {
        const int64_t              n = ggml_blck_size(type);
        const std::vector<uint8_t> zeros(ggml_type_size(type));
        std::vector<float>         got(n, 1.0f);
        dequantize_row(type, zeros.data(), got.data(), n);
        CHECK(got == std::vector<float>(n, 0.0f), ggml_type_name(type));
        CHECK(row_values(type, zeros.data(), n) == got, ggml_type_name(type));
    }
}

//
// from float
//

// Rows of one block that try the ends of the formats.
struct Case {
    const char *       name;
    std::vector<float> values;
};

static std::vector<Case> cases() {
    Random     random(2);
    const auto scaled = [&](float scale) { return random.floats(32, scale); };
    const auto filled = [](const std::function<float(int)> & value) {
        std::vector<float> values(32);
        for (int i = 0; i < 32; ++i) {
            values[i] = value(i);
        }
        return values;
    };
    std::vector<Case> list = {
        { "zero", filled([](int) { return 0.0f; }) },
        { "negative zero", filled([](int) { return -0.0f; }) },
        { "constant", filled([](int) { return 0.3f; }) },
        { "negative constant", filled([](int) { return -0.3f; }) },
        { "ones of either sign", filled([](int i) { return i % 2 ? 1.0f : -1.0f; }) },
        { "ramp", filled([](int i) { return static_cast<float>(i - 16); }) },
        { "halves", filled([](int i) { return 0.5f * static_cast<float>(i - 16); }) },
        { "positive", filled([](int i) { return 1.0f + 0.01f * static_cast<float>(i); }) },
        { "negative", filled([](int i) { return -1.0f - 0.01f * static_cast<float>(i); }) },
        { "outlier", filled([](int i) { return i == 7 ? 100.0f : 1e-3f * static_cast<float>(i); }) },
        { "negative outlier", filled([](int i) { return i == 31 ? -100.0f : 1e-3f * static_cast<float>(i); }) },
        { "only one", filled([](int i) { return i == 16 ? 1.0f : 0.0f; }) },
        { "largest of half", filled([](int i) { return i % 3 ? 65504.0f : -65504.0f; }) },
        { "below the smallest of half", filled([](int i) { return 1e-9f * static_cast<float>(i - 9); }) },
        { "smallest of single", filled([](int i) { return FLT_MIN * static_cast<float>(i - 9); }) },
        { "denormal", filled([](int i) { return FLT_TRUE_MIN * static_cast<float>(100 * i - 1000); }) },
        { "one denormal", filled([](int i) { return i == 3 ? FLT_TRUE_MIN : 0.0f; }) },
    };
    for (float scale : { 1e-12f, 1e-7f, 1e-5f, 1e-2f, 1.0f, 1e3f, 1.5e4f }) {
        for (int i = 0; i < 8; ++i) {
            list.push_back({ "random", scaled(scale) });
        }
    }
    return list;
}

static std::vector<uint8_t> quantized(ggml_type type, const std::vector<float> & values) {
    const auto           n = static_cast<int64_t>(values.size());
    std::vector<uint8_t> row(ggml_row_size(type, n));
    quantize_row(type, values.data(), row.data(), n);
    return row;
}

TEST(quantised_blocks_equal_the_definition_of_their_format) {
    for (ggml_type type : kColumnTypes) {
        for (const Case & at : cases()) {
            const std::vector<uint8_t> row = quantized(type, at.values);
            CHECK(holds_values(type, row.data(), at.values), std::string(ggml_type_name(type)) + ", " + at.name);
        }
    }
}

TEST(quantised_values_are_within_half_a_level) {
    for (ggml_type type : kColumnTypes) {
        for (const Case & at : cases()) {
            if (!has_blocks_of_32(type)) {
                continue;
            }
            const std::vector<uint8_t> row     = quantized(type, at.values);
            const std::vector<float>   got     = row_values(type, row.data(), 32);
            const Block                block   = load_block(type, row.data());
            const float                scale   = std::fabs(ggml_fp16_to_fp32(block.scale));
            const float                largest = largest_of(at.values.data(), 32);
            // the highest level of Q4_0 and Q5_0 falls one short of the lowest; half precision keeps 11 bits,
            // and 2^-25 at the least is lost below its smallest value, for each of up to 127 levels
            const float levels   = type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 ? 1.0f : 0.5f;
            const float accuracy = levels * scale + largest * 0x1p-9f + 128 * 0x1p-25f;
            for (int i = 0; i < 32; ++i) {
                CHECK(std::fabs(got[i] - at.values[i]) <= accuracy, std::string(ggml_type_name(type)) + ", " + at.name +
                                                                        ": " + std::to_string(got[i]) + " for " +
                                                                        std::to_string(at.values[i]));
            }
        }
    }
}

TEST(quantised_random_rows_equal_those_of_ggml) {
    Random random(3);
    for (ggml_type type : kColumnTypes) {
        for (float scale : { 1e-3f, 0.1f, 10.0f }) {
            const std::vector<float> values = random.floats(32 * 100, scale);
            std::vector<uint8_t>     expected(ggml_row_size(type, 32 * 100));
            if (type == GGML_TYPE_F32) {
                std::memcpy(expected.data(), values.data(), expected.size());
            } else {
                ggml_get_type_traits(type)->from_float_ref(values.data(), expected.data(), 32 * 100);
            }
            CHECK(quantized(type, values) == expected, ggml_type_name(type));
        }
    }
}

TEST(weights_of_a_type_that_keeps_its_type_survive_with_all_columns_kept) {
    Random random(4);
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        const std::vector<uint8_t> row = random.weights(type, 320);
        CHECK(quantized(type, row_values(type, row.data(), 320)) == row, ggml_type_name(type));
    }
}

TEST(values_that_are_not_finite_do_no_harm) {
    const float infinity = std::numeric_limits<float>::infinity();
    for (ggml_type type : kColumnTypes) {
        for (float bad : { infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), FLT_MAX, -FLT_MAX, 1e6f }) {
            for (int position : { 0, 5, 31 }) {
                std::vector<float> values(32, 0.25f);
                values[position] = bad;
                quantized(type, values);
            }
            quantized(type, std::vector<float>(32, bad));
        }
    }
}

//
// vectors
//

static const std::vector<int64_t> kSizes = { 0, 1, 31, 33, 64, 1000 };

TEST(gather_takes_the_named_values) {
    Random random(5);
    for (int64_t n : kSizes) {
        const std::vector<float>   from  = random.floats(1000, 1.0f);
        const std::vector<int32_t> index = random.neurons(static_cast<int32_t>(n), 1000);
        std::vector<float>         got(n + 1, 7.0f);
        gather(from.data(), index.data(), got.data(), n);
        for (int64_t i = 0; i < n; ++i) {
            CHECK(got[i] == from[index[i]]);
        }
        CHECK(got[n] == 7.0f);
    }
}

TEST(dot_is_the_sum_of_products) {
    Random random(6);
    for (int64_t n : kSizes) {
        const std::vector<float> a    = random.floats(n, 1.0f);
        const std::vector<float> b    = random.floats(n, 1.0f);
        double                   sum  = 0.0;
        double                   size = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            sum += static_cast<double>(a[i]) * b[i];
            size += std::fabs(static_cast<double>(a[i]) * b[i]);
        }
        CHECK(std::fabs(dot(a.data(), b.data(), n) - sum) <= 1e-6 * size, std::to_string(n));
    }
}

TEST(add_squares_adds_each_square) {
    Random random(7);
    for (int64_t n : kSizes) {
        const std::vector<float> x     = random.floats(n, 1.0f);
        const std::vector<float> start = random.floats(n + 1, 1.0f);
        std::vector<float>       got   = start;
        add_squares(x.data(), got.data(), n);
        for (int64_t i = 0; i < n; ++i) {
            CHECK(close(got[i], start[i] + x[i] * x[i], std::fabs(start[i]) + x[i] * x[i]));
        }
        CHECK(got[n] == start[n]);
    }
}
