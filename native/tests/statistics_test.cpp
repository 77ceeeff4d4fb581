// Sums over tokens, and what each token is measured for, against plain code in double precision.

#include "statistics.h"

#include "check.h"
#include "model.h"
#include "no_memory.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>

using namespace coreinfer;
using namespace test;

// Around the strip of neurons that are added up together, and several of them.
static const std::vector<int64_t> kWidths = { 0, 1, 2, 31, 63, 64, 65, 127, 128, 200, 1000 };

// A fraction, so that how many are the largest can be told without rounding.
struct Share {
    int64_t of;
    int64_t from;

    float   value() const { return static_cast<float>(of) / static_cast<float>(from); }
    int64_t rounded_up(int64_t n) const { return (of * n + from - 1) / from; }
};

static const std::vector<Share> kShares = { { 0, 1 }, { 1, 1000000 }, { 1, 4 }, { 2, 5 }, { 999, 1000 }, { 1, 1 } };

static TokenMeasure measure(const std::vector<float> & act, float top_share) {
    return measure_token(act.data(), static_cast<int64_t>(act.size()), top_share);
}

static int64_t n_top(const std::vector<float> & act, float top_share) {
    const float least = measure(act, top_share).top;
    return std::count_if(act.begin(), act.end(), [&](float x) { return x >= least; });
}

static double norm_of(const std::vector<float> & act) {
    double sum = 0.0;
    for (float x : act) {
        sum += static_cast<double>(x) * x;
    }
    return sum;
}

static std::vector<float> filled(int64_t n, const std::function<float(int64_t)> & value) {
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; ++i) {
        values[i] = value(i);
    }
    return values;
}

//
// what a token is measured for
//

TEST(the_share_of_the_positive_values_rounded_up_is_at_or_above_the_least_of_the_largest) {
    Random random(1);
    for (int64_t n : kWidths) {
        for (int round = 0; round < 20; ++round) {
            const std::vector<float> act      = random.floats(n, 1.0f);
            std::vector<float>       positive = act;
            positive.erase(std::remove_if(positive.begin(), positive.end(), [](float x) { return x <= 0.0f; }),
                           positive.end());
            std::sort(positive.begin(), positive.end(), std::greater<float>());
            for (const Share & share : kShares) {
                const int64_t n_largest = share.rounded_up(static_cast<int64_t>(positive.size()));
                const float   expected  = n_largest ? positive[n_largest - 1] : FLT_MAX;
                CHECK(measure(act, share.value()).top == expected,
                      std::to_string(share.value()) + " of " + std::to_string(n));
                CHECK(n_top(act, share.value()) == n_largest);
            }
        }
    }
}

TEST(a_token_without_a_positive_value_has_no_largest) {
    Random random(2);
    for (int64_t n : kWidths) {
        std::vector<float> negative = random.floats(n, 1.0f);
        std::transform(negative.begin(), negative.end(), negative.begin(), [](float x) { return -std::fabs(x); });
        for (const Share & share : kShares) {
            for (const auto & act : { negative, std::vector<float>(n, 0.0f), std::vector<float>(n, -0.0f),
                                      filled(n, [&](int64_t i) { return i % 2 ? 0.0f : negative[i]; }) }) {
                CHECK(n_top(act, share.value()) == 0, std::to_string(n));
            }
        }
    }
}

TEST(values_equal_to_the_least_of_the_largest_are_among_them) {
    for (const Share & share : kShares) {
        for (int64_t n : { 7, 64, 65, 200, 1000 }) {
            const int64_t n_largest = share.rounded_up(n);
            CHECK(n_top(std::vector<float>(n, 0.7f), share.value()) == (n_largest ? n : 0), std::to_string(n));
            // all the same but the largest and the smallest
            const std::vector<float> act  = filled(n, [](int64_t i) { return i == 0 ? 2.0f : i == 5 ? 0.5f : 1.0f; });
            const bool               ties = n_largest > 1 && n_largest < n;
            CHECK(n_top(act, share.value()) == (ties ? n - 1 : n_largest), std::to_string(n));
        }
    }
}

TEST(any_share_above_zero_takes_the_largest_and_none_takes_no_other) {
    Random random(3);
    for (int64_t n : { 5, 64, 1000 }) {
        std::vector<float> act = random.floats(n, 1.0f);
        act[n / 2]             = 10.0f;
        for (float share : { FLT_TRUE_MIN, FLT_MIN, 1e-30f, 1e-7f }) {
            CHECK(measure(act, share).top == 10.0f, std::to_string(n));
        }
        CHECK(n_top(act, 0.0f) == 0);
    }
    CHECK(n_top({ FLT_TRUE_MIN, -1.0f, 0.0f }, 1.0f) == 1);
}

TEST(the_inverse_square_is_one_over_the_sum_of_squares) {
    Random random(4);
    for (int64_t n : kWidths) {
        for (float scale : { 1e-15f, 1e-3f, 1.0f, 1e3f, 1e15f }) {
            const std::vector<float> act = random.floats(n, scale);
            for (const Share & share : kShares) {
                const float inverse = measure(act, share.value()).inverse_square;
                CHECK(std::fabs(inverse * norm_of(act) - (n ? 1.0 : 0.0)) <= 1e-6, std::to_string(inverse));
            }
        }
    }
}

TEST(a_token_whose_squares_vanish_adds_nothing_that_is_normalised) {
    for (float value : { 0.0f, -0.0f, FLT_TRUE_MIN, 1e-30f, 1e-21f, -1e-20f, 2e-20f }) {
        // with zeros between, which must not be multiplied with an infinite inverse
        const std::vector<float> act = filled(70, [&](int64_t i) { return i % 2 ? value : 0.0f; });
        const TokenMeasure       of  = measure(act, 0.4f);
        std::vector<float>       sum(70), sum_sq(70), normalized(70), top(70), active(70);
        CHECK(of.inverse_square <= FLT_MAX, std::to_string(value * 1e20f));
        add_tokens(act.data(), 70, 1, &of, { sum.data(), sum_sq.data(), normalized.data(), top.data(), active.data() },
                   70);
        CHECK(std::all_of(normalized.begin(), normalized.end(), [](float x) { return x >= 0.0f && x <= 1.0f; }));
        CHECK(std::count(top.begin(), top.end(), 1.0f) == (value > 0.0f ? 35 : 0));
        CHECK(std::count(active.begin(), active.end(), 1.0f) == (value != 0.0f ? 35 : 0));
    }
}

TEST(a_token_is_measured_without_memory) {
    Random random(5);
    for (int64_t n : { 1000, 10, 0, 64 }) {
        const std::vector<float> act = random.floats(n, 1.0f);
        const NoMemory           none_left;
        const TokenMeasure       of = measure_token(act.data(), n, 0.4f);
        CHECK(std::count_if(act.begin(), act.end(), [&](float x) { return x >= of.top; }) ==
              static_cast<int64_t>(
                  std::ceil(0.4f * std::count_if(act.begin(), act.end(), [](float x) { return x > 0.0f; }))));
    }
}

TEST(tokens_that_are_not_finite_do_no_harm) {
    Random      random(6);
    const float infinity = std::numeric_limits<float>::infinity();
    const float nan      = std::numeric_limits<float>::quiet_NaN();
    for (int round = 0; round < 200; ++round) {
        const int64_t      n      = 1 + random.below(300);
        const int32_t      one_in = 1 + round % 5;
        std::vector<float> act    = random.floats(n, 1.0f);
        for (float & x : act) {
            if (random.below(one_in) == 0) {
                const float bad[] = { nan, -nan, infinity, -infinity, FLT_MAX, -FLT_MAX };
                x                 = bad[round % 7 == 6 ? random.below(6) : round % 7];
            }
        }
        std::vector<float> sums(5 * n);
        for (const Share & share : kShares) {
            // in memory of just this size, so that reading beyond it is seen
            const TokenMeasure of = measure(act, share.value());
            add_tokens(act.data(), n, 1, &of, { &sums[0], &sums[n], &sums[2 * n], &sums[3 * n], &sums[4 * n] }, n);
        }
    }
}

//
// sums
//

namespace {

// Tokens with measures that fit them in no way, so that add_tokens must use what it is given.
struct Tokens {
    Tokens(Random & random, int64_t width, int64_t rows, int64_t from_row_to_row) :
        n(width),
        n_rows(rows),
        stride(from_row_to_row),
        x(random.floats(stride * n_rows, 1.0f)),
        start(random.floats(n + 1, 1.0f)),
        measures(n_rows) {
        for (int64_t row = 0; row < n_rows; ++row) {
            float * at = x.data() + row * stride;
            if (row % 5 == 3) {
                std::fill_n(at, n, 0.0f);
                measures[row] = { 0.0f, FLT_MAX };
                continue;
            }
            // the value of a neuron, which must be counted; or more than any
            measures[row] = { std::fabs(random.floats(1, 1.0f)[0]), n && row % 5 != 2 ? at[n / 2] : FLT_MAX };
        }
    }

    int64_t                   n;
    int64_t                   n_rows;
    int64_t                   stride;
    std::vector<float>        x;
    std::vector<float>        start;
    std::vector<TokenMeasure> measures;
};

// Expects start plus what each token brings, in terms of its value and its measure, and nothing behind it.
void check_sums(const std::vector<float> & got, const Tokens & tokens,
                const std::function<double(double, const TokenMeasure &)> & term, double tolerance) {
    for (int64_t i = 0; i < tokens.n; ++i) {
        double expected = tokens.start[i];
        double size     = std::fabs(expected);
        for (int64_t row = 0; row < tokens.n_rows; ++row) {
            const double value = term(tokens.x[row * tokens.stride + i], tokens.measures[row]);
            expected += value;
            size += std::fabs(value);
        }
        CHECK(std::fabs(got[i] - expected) <= tolerance * size,
              std::to_string(got[i]) + " for " + std::to_string(expected));
    }
    CHECK(got[tokens.n] == tokens.start[tokens.n]);
}

} // namespace

TEST(add_tokens_adds_what_each_token_brings_to_each_sum) {
    Random random(7);
    for (int64_t n : kWidths) {
        for (int64_t n_rows : { 0, 1, 2, 17 }) {
            for (int64_t stride : { n, n + 13 }) {
                const Tokens tokens(random, n, n_rows, stride);
                for (bool with_normalized : { false, true }) {
                    for (bool with_top : { false, true }) {
                        std::vector<float> sum        = tokens.start;
                        std::vector<float> sum_sq     = tokens.start;
                        std::vector<float> normalized = tokens.start;
                        std::vector<float> top        = tokens.start;
                        std::vector<float> active     = tokens.start;
                        add_tokens(tokens.x.data(), stride, n_rows,
                                   with_normalized || with_top ? tokens.measures.data() : nullptr,
                                   { sum.data(), sum_sq.data(), with_normalized ? normalized.data() : nullptr,
                                     with_top ? top.data() : nullptr, with_top ? active.data() : nullptr },
                                   n);
                        check_sums(sum, tokens, [](double x, const TokenMeasure &) { return x; }, 1e-6);
                        check_sums(sum_sq, tokens, [](double x, const TokenMeasure &) { return x * x; }, 1e-6);
                        check_sums(
                            normalized, tokens,
                            [&](double x, const TokenMeasure & of) {
                                return with_normalized ? x * x * of.inverse_square : 0.0;
                            },
                            1e-6);
                        check_sums(
                            top, tokens,
                            [&](double x, const TokenMeasure & of) {
                                return with_top && x >= static_cast<double>(of.top) ? 1.0 : 0.0;
                            },
                            1e-6);
                        check_sums(
                            active, tokens,
                            [&](double x, const TokenMeasure &) { return with_top && x != 0.0 ? 1.0 : 0.0; }, 1e-6);
                    }
                }
            }
        }
    }
}

TEST(tokens_measured_and_added_up_give_the_share_of_each_neuron_in_them) {
    Random      random(8);
    const Share share = { 2, 5 };
    for (int64_t n : kWidths) {
        constexpr int64_t         kRows = 21;
        const std::vector<float>  x     = random.floats(n * kRows, 3.0f);
        std::vector<double>       expected(n);
        std::vector<float>        expected_top(n);
        std::vector<TokenMeasure> measures;
        for (int64_t row = 0; row < kRows; ++row) {
            const std::vector<float> act(x.begin() + row * n, x.begin() + (row + 1) * n);
            const double             norm       = norm_of(act);
            const int64_t            n_positive = std::count_if(act.begin(), act.end(), [](float v) { return v > 0; });
            for (int64_t i = 0; i < n; ++i) {
                expected[i] += static_cast<double>(act[i]) * act[i] / norm;
                // among the k largest: fewer than k are larger
                const int64_t n_larger = std::count_if(act.begin(), act.end(), [&](float v) { return v > act[i]; });
                expected_top[i] += act[i] > 0 && n_larger < share.rounded_up(n_positive);
            }
            measures.push_back(measure(act, share.value()));
        }
        std::vector<float> sum(n), sum_sq(n), normalized(n), top(n);
        add_tokens(x.data(), n, kRows, measures.data(),
                   { sum.data(), sum_sq.data(), normalized.data(), top.data(), nullptr }, n);
        for (int64_t i = 0; i < n; ++i) {
            CHECK(std::fabs(normalized[i] - expected[i]) <= 2e-6 * expected[i], std::to_string(n));
        }
        CHECK(top == expected_top, std::to_string(n));
    }
}

TEST(neurons_added_up_in_parts_give_the_same_sums) {
    Random            random(9);
    constexpr int64_t kWidth = 500;
    const Tokens      tokens(random, kWidth, 7, kWidth);
    for (bool with_extra : { false, true }) {
        const auto added = [&](const std::vector<int64_t> & ends) {
            std::vector<float> sums(5 * kWidth);
            float * const      at  = sums.data();
            const Sums         all = { at, at + kWidth, with_extra ? at + 2 * kWidth : nullptr,
                                       with_extra ? at + 3 * kWidth : nullptr, with_extra ? at + 4 * kWidth : nullptr };
            int64_t            start = 0;
            for (int64_t end : ends) {
                add_tokens(tokens.x.data() + start, kWidth, tokens.n_rows, tokens.measures.data(), all.from(start),
                           end - start);
                start = end;
            }
            return sums;
        };
        const std::vector<float> whole = added({ kWidth });
        CHECK(added({ 64, 192, 192, kWidth }) == whole);
        CHECK(std::any_of(whole.begin() + 2 * kWidth, whole.end(), [](float x) { return x != 0.0f; }) == with_extra);
    }
}
