// Rows of the levels below full in ggml's own types.

#include "kernels/device_levels.h"

#include "check.h"
#include "model.h"
#include "quant.h"

#include <cmath>
#include <limits>
#include <map>

using namespace coreinfer;
using namespace test;

static std::vector<float> held(ggml_type type, const std::vector<float> & weights) {
    const auto           n = static_cast<int64_t>(weights.size());
    std::vector<uint8_t> row(ggml_row_size(type, n));
    std::vector<float>   result(weights.size());
    quantize_device_row(type, weights.data(), n, row.data());
    dequantize_row(type, row.data(), result.data(), n);
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

constexpr coreinfer_level kLow[] = { COREINFER_LEVEL_4_BITS, COREINFER_LEVEL_3_BITS, COREINFER_LEVEL_2_BITS };

TEST(rows_of_any_width_of_a_type_keep_normal_weights) {
    const std::map<ggml_type, double> most = {
        { GGML_TYPE_Q4_0, 0.012 }, { GGML_TYPE_Q3_K, 0.03 }, { GGML_TYPE_Q2_K, 0.1 }, { GGML_TYPE_Q2_0, 0.2 }
    };
    Random random(1);
    for (int64_t n : { 32, 64, 96, 192, 256, 288, 512, 576, 1024, 1056, 4096 }) {
        const std::vector<float> weights = random.floats(n, 0.02f);
        for (coreinfer_level level : kLow) {
            const ggml_type type = device_type(level, n);
            CHECK((type == GGML_TYPE_COUNT) == (level == COREINFER_LEVEL_3_BITS   ? n % 256 != 0
                                                : level == COREINFER_LEVEL_2_BITS ? n % 64 != 0
                                                                                  : n % 32 != 0));
            if (type != GGML_TYPE_COUNT) {
                CHECK(relative_error(weights, held(type, weights)) < most.at(type), std::to_string(n));
            }
        }
    }
}

TEST(a_scale_has_the_sign_that_serves_the_largest_weight) {
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q3_K, GGML_TYPE_Q2_0 }) {
        for (float largest : { 1.0f, -1.0f }) {
            std::vector<float> weights(256, 0.0f);
            weights[3]                   = largest;
            const std::vector<float> got = held(type, weights);
            CHECK(std::fabs(got[3] - largest) < 0.05f && got[4] == 0.0f, ggml_type_name(type));
        }
    }
}

TEST(weights_that_no_half_holds_become_finite_ones) {
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q3_K, GGML_TYPE_Q2_K, GGML_TYPE_Q2_0 }) {
        for (float value : { 0.0f, 1e-30f, -1e-12f, 7e4f, -1e12f, std::numeric_limits<float>::max() }) {
            for (float got : held(type, std::vector<float>(256, value))) {
                CHECK(std::isfinite(got), ggml_type_name(type));
            }
        }
    }
}
