// Rows of 4, 3 and 2 bits.

#include "kernels/low_bits.h"

#include "check.h"
#include "model.h"

#include <algorithm>
#include <cmath>

using namespace coreinfer;
using namespace test;

static std::vector<float> held(ggml_type type, const std::vector<float> & weights) {
    const auto           n = static_cast<int64_t>(weights.size());
    std::vector<uint8_t> row(row_size(type, n));
    std::vector<float>   result(weights.size());
    quantize_low_row(type, weights.data(), n, row.data());
    dequantize_low_row(type, row.data(), n, result.data());
    return result;
}

static double relative_error(const std::vector<float> & weights, const std::vector<float> & got) {
    double error = 0.0;
    double all   = 0.0;
    for (size_t i = 0; i < weights.size(); ++i) {
        error += std::pow(static_cast<double>(got[i]) - weights[i], 2);
        all += std::pow(static_cast<double>(weights[i]), 2);
    }
    return error / all;
}

TEST(rows_of_any_width_keep_normal_weights_to_a_few_per_cent) {
    Random random(1);
    for (int64_t n : { 32, 64, 96, 256, 288, 1024, 1056, 2080 }) {
        const std::vector<float> weights = random.floats(n, 0.02f);
        CHECK(relative_error(weights, held(kLow4, weights)) < 0.006, std::to_string(n));
        CHECK(relative_error(weights, held(kLow3, weights)) < 0.025, std::to_string(n));
        CHECK(relative_error(weights, held(kLow2, weights)) < 0.1, std::to_string(n));
    }
}

TEST(a_row_takes_about_as_many_bits_as_it_is_named_after) {
    for (int64_t n : { 576, 1024, 4096, 14336 }) {
        CHECK(8.0 * static_cast<double>(row_size(kLow4, n)) / static_cast<double>(n) < 4.6);
        CHECK(8.0 * static_cast<double>(row_size(kLow3, n)) / static_cast<double>(n) < 3.6);
        CHECK(8.0 * static_cast<double>(row_size(kLow2, n)) / static_cast<double>(n) < 2.6);
    }
}

TEST(weights_of_zero_stay_zero) {
    for (ggml_type type : { kLow4, kLow3, kLow2 }) {
        const std::vector<float> none(96, 0.0f);
        CHECK(held(type, none) == none);
        std::vector<float> some      = none;
        some[40]                     = 1.0f; // its own half of a block has one level for zero, too
        const std::vector<float> got = held(type, some);
        CHECK(std::count(got.begin(), got.end(), 0.0f) == 95 && std::fabs(got[40] - 1.0f) < 0.01f);
    }
}

TEST(small_weights_beside_a_large_one_are_held) {
    Random random(3);
    for (ggml_type type : { kLow3, kLow2 }) {
        for (float size : { 0.03f, 0.05f, 0.1f, 0.2f }) {
            std::vector<float> weights    = random.floats(96, size);
            weights[5]                    = 1.0f;
            const std::vector<float> got  = held(type, weights);
            const auto               rest = [](const std::vector<float> & all) {
                return std::vector<float>(all.begin() + 16, all.end());
            };
            CHECK(relative_error(rest(weights), rest(got)) < (type == kLow3 ? 0.12 : 0.25), std::to_string(size));
        }
    }
}

TEST(weights_of_one_sign_and_far_outliers_are_held) {
    Random random(2);
    for (ggml_type type : { kLow4, kLow3, kLow2 }) {
        for (float sign : { 1.0f, -1.0f }) {
            std::vector<float> weights = random.floats(128, 0.1f);
            for (float & weight : weights) {
                weight = sign * (1.0f + std::fabs(weight));
            }
            CHECK(relative_error(weights, held(type, weights)) < 0.01);
            weights[77]                  = sign * 1000.0f;
            const std::vector<float> got = held(type, weights);
            CHECK(std::fabs(got[77] - weights[77]) < 40.0f);
        }
    }
}

TEST(the_smallest_and_the_largest_floats_give_finite_weights) {
    for (ggml_type type : { kLow4, kLow3, kLow2 }) {
        for (float size : { 1e-45f, 1e-40f, 1e-10f, 1e5f, 1e30f, 3e38f }) {
            std::vector<float> weights(64, size);
            weights[3]                   = -size;
            const std::vector<float> got = held(type, weights);
            CHECK(std::all_of(got.begin(), got.end(), [](float x) { return std::isfinite(x); }), std::to_string(size));
        }
    }
}
