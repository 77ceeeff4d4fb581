#pragma once

// Sums of the activation, which is the input of ffn_down, over the tokens of a prompt.

#include <cstdint>

namespace coreinfer {

// Two numbers of one token that its activation is compared with.
struct TokenMeasure {
    float inverse_square; // 1 / squared Euclidean norm of the activation; 0 if the norm is 0
    float top;            // the smallest of its largest positive values
};

// act [n]. top_share: the share of the positive values that count as the largest. Their number is rounded up. With 0,
// no value counts. Takes no memory.
TokenMeasure measure_token(const float * act, int64_t n, float top_share);

// Sums over tokens, one for each neuron.
struct Sums {
    float * sum;           // of the activation
    float * sum_sq;        // of its square
    float * normalized_sq; // of its square in the token's activation of norm 1; nullptr if not wanted
    float * top;           // how often it was among the largest positive; nullptr if not wanted
    float * active;        // how often it was not zero; nullptr if not wanted

    Sums from(int64_t neuron) const;
};

// Add n_rows tokens of n neurons, stride floats apart in x. measures [n_rows] may be nullptr where neither
// normalized_sq nor top is wanted.
void add_tokens(const float * x, int64_t stride, int64_t n_rows, const TokenMeasure * measures, const Sums & sums,
                int64_t n);

} // namespace coreinfer
